"""The placements that are compared with transformers."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tolerance:
    """Largest difference from the reference: absolute for logits and losses, relative for the rest."""

    logits: float
    loss: float
    norm: float
    gradient: float
    weight: float


FP32 = Tolerance(logits=1e-4, loss=1e-5, norm=1e-5, gradient=1e-4, weight=1e-4)
# 8 bits of mantissa; where a gradient is hardly more than its rounding, Adam's step may point anywhere.
BF16 = Tolerance(logits=1e-1, loss=2e-3, norm=5e-3, gradient=1e-1, weight=2e-2)


@dataclass(frozen=True)
class Case:
    """One placement and what else is set.

    Attributes:
        name: in tables.
        mode: the deployment mode.
        encoder, language: (tensor, pipeline, data) sizes.
        uneven: samples with 0 to 2 images.
        settings: `sequence_parallel`, `distributed`, `overlap`; `frozen` (the tower), `frozen_language`; `rates`, for
            settings of the optimizer by module; `vit`, for a tower that is Megatron-Core's ViT; `adapters` and `dora`,
            for adapters on both modules, `encoder_adapters`, for such on the encoder alone; `packed`, for samples of
            several documents.
        subject: the model, of `SUBJECTS`.
        experts: ranks that experts are spread over.
        context: ranks that share a sequence in the language model, and in a homogeneous placement in every module.
    """

    name: str
    mode: str
    encoder: tuple[int, int, int]
    language: tuple[int, int, int]
    uneven: bool = False
    settings: tuple[str, ...] = ()
    subject: str = "plain"
    experts: int = 1
    context: int = 1

    @property
    def packing(self) -> int:
        """What lengths of packed documents are multiples of; 0: samples are not packed."""
        # A document is cut into two chunks for each rank that shares it.
        return 0 if "packed" not in self.settings else 1 if self.context == 1 else 2 * self.context

    @property
    def tolerance(self) -> Tolerance:
        """How far it may be from its reference."""
        return BF16 if self.subject == "bf16" else FP32

    @property
    def ranks(self) -> int:
        """How many ranks it takes."""
        encoder, language = (a * b * c for a, b, c in (self.encoder, self.language))
        return language * self.context + (encoder if self.mode == "heterogeneous" else 0)

    def placement(self) -> Any:
        """The placement."""
        from megatron.bridge.mimo import MimoParallelismConfig, ModuleParallelismConfig

        names = ("tensor_parallel", "pipeline_parallel", "data_parallel")
        encoder = ModuleParallelismConfig(**dict(zip(names, self.encoder, strict=True)))
        language = ModuleParallelismConfig(**dict(zip(names, self.language, strict=True)))
        for each in (encoder, language) if self.mode == "homogeneous" else (language,):
            each.expert_parallel, each.context_parallel = self.experts, self.context
        if self.mode == "heterogeneous":
            language.rank_offset = encoder.total_ranks
        return MimoParallelismConfig(
            llm_module_name="language_module",
            deployment_mode=self.mode,
            module_parallelisms={"images": encoder, "language_module": language},
        )


_ONE, _TP2, _PP2, _DP2 = (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)
_TP4, _DP4, _TP2_DP2, _TP2_PP2 = (4, 1, 1), (1, 1, 4), (2, 1, 2), (2, 2, 1)
_QWEN = "Qwen2.5-VL"
_SHARED = ("distributed", "overlap")
_FROZEN, _STILL, _PACKED = ("frozen", *_SHARED), ("frozen_language",), ("packed", *_SHARED)
_SP_PACKED = ("sequence_parallel", "packed")

# Those of every run of the tests: some of each mode, of one to three ranks.
QUICK = (
    Case("one rank", "homogeneous", _ONE, _ONE, uneven=True),
    Case("TP2", "homogeneous", _TP2, _TP2),
    Case("PP2, tied embeddings", "homogeneous", _PP2, _PP2, True, subject="tied"),
    Case("EP2, mixture of experts", "homogeneous", _DP2, _DP2, True, subject="experts", experts=2),
    Case("encoder DP2, language TP2 SP", "colocated", _DP2, _TP2, True, ("sequence_parallel",)),
    Case("encoder TP2, language DP2", "colocated", _TP2, _DP2, True),
    Case("encoder DP2, language TP2, frozen tower, distributed", "colocated", _DP2, _TP2, True, ("frozen", *_SHARED)),
    Case("encoder DP2, language TP2, bf16", "colocated", _DP2, _TP2, True, subject="bf16"),
    Case("encoder TP2, language DP2, Qwen2.5-VL", "colocated", _TP2, _DP2, True, subject="Qwen2.5-VL"),
    Case(
        "encoder DP2, language TP2, settings by module, distributed", "colocated", _DP2, _TP2, True, ("rates", *_SHARED)
    ),
    Case("1 + 1, frozen tower", "heterogeneous", _ONE, _ONE, True, ("frozen",)),
    Case("1 + PP2, tied embeddings", "heterogeneous", _ONE, _PP2, True, subject="tied"),
    Case("1 + PP2, Qwen2.5-VL", "heterogeneous", _ONE, _PP2, True, subject="Qwen2.5-VL"),
    Case("DP2 + 1", "heterogeneous", _DP2, _ONE, True),
    Case("1 + PP2, Qwen2.5-VL, packed", "heterogeneous", _ONE, _PP2, True, ("packed",), subject="Qwen2.5-VL"),
    Case("CP2, packed", "homogeneous", _ONE, _ONE, True, ("packed",), context=2),
    Case("encoder DP2, language CP2, packed", "colocated", _DP2, _ONE, True, ("packed",), context=2),
    Case("1 + CP2, Qwen2.5-VL", "heterogeneous", _ONE, _ONE, True, subject=_QWEN, context=2),
    Case(
        "encoder TP2, language DP2, ViT of SigLIP, distributed",
        "colocated",
        _TP2,
        _DP2,
        True,
        ("vit", *_SHARED),
        subject="SigLIP",
    ),
    Case("TP2 + 1, ViT", "heterogeneous", _TP2, _ONE, True, ("vit",)),
    Case("encoder TP2, language DP2, DoRA", "colocated", _TP2, _DP2, True, ("dora",)),
)
# The rest of the table.
WIDE = (
    Case("encoder DP2, language TP2, packed", "colocated", _DP2, _TP2, True, ("packed",)),
    Case("TP2 SP, packed", "homogeneous", _TP2, _TP2, True, ("sequence_parallel", "packed")),
    Case("1 + PP2, frozen language model", "heterogeneous", _ONE, _PP2, True, ("frozen_language",)),
    Case("TP2, ViT", "homogeneous", _TP2, _TP2, True, ("vit",)),
    Case("DP2 + 1, DoRA", "heterogeneous", _DP2, _ONE, True, ("dora",)),
    Case("1 + TP2 SP", "heterogeneous", _ONE, _TP2, True, ("sequence_parallel",)),
    Case("DP2", "homogeneous", _DP2, _DP2, True),
    Case("PP2", "homogeneous", _PP2, _PP2, True),
    Case("TP2 SP, distributed", "homogeneous", _TP2, _TP2, True, ("sequence_parallel", *_SHARED)),
    Case("TP2 PP2", "homogeneous", _TP2_PP2, _TP2_PP2, True),
    Case("one rank, bf16", "homogeneous", _ONE, _ONE, True, subject="bf16"),
    Case("one rank, mixture of experts", "homogeneous", _ONE, _ONE, True, subject="experts"),
    Case("one rank, Qwen2.5-VL", "homogeneous", _ONE, _ONE, True, subject="Qwen2.5-VL"),
    Case("PP2, Qwen2.5-VL", "homogeneous", _PP2, _PP2, True, subject="Qwen2.5-VL"),
    Case("TP2 SP, settings by module", "homogeneous", _TP2, _TP2, True, ("rates", "sequence_parallel")),
    Case("DP2, frozen language model, distributed", "homogeneous", _DP2, _DP2, True, ("frozen_language", *_SHARED)),
    Case("CP2", "homogeneous", _ONE, _ONE, True, context=2),
    Case("TP2 SP CP2", "homogeneous", _TP2, _TP2, True, ("sequence_parallel",), context=2),
    Case("CP2 PP2, packed, tied embeddings", "homogeneous", _PP2, _PP2, True, ("packed",), "tied", context=2),
    Case("CP2 DP2, packed, distributed", "homogeneous", _DP2, _DP2, True, ("packed", *_SHARED), context=2),
    Case("CP2, mixture of experts", "homogeneous", _ONE, _ONE, True, subject="experts", context=2),
    Case("encoder DP2, language TP2", "colocated", _DP2, _TP2),
    Case(
        "encoder TP2, language DP2 EP2, mixture of experts", "colocated", _TP2, _DP2, True, subject="experts", experts=2
    ),
    Case(
        "encoder DP4, language TP2 SP DP2 EP2, mixture of experts",
        "colocated",
        _DP4,
        _TP2_DP2,
        True,
        ("sequence_parallel",),
        subject="experts",
        experts=2,
    ),
    Case(
        "encoder DP2, language TP2 SP, Qwen2.5-VL",
        "colocated",
        _DP2,
        _TP2,
        True,
        ("sequence_parallel",),
        subject="Qwen2.5-VL",
    ),
    Case("encoder TP2, language DP2, frozen language model", "colocated", _TP2, _DP2, True, ("frozen_language",)),
    Case("encoder DP4, language TP2 DP2", "colocated", _DP4, _TP2_DP2, True),
    Case("encoder TP4, language TP2 DP2", "colocated", _TP4, _TP2_DP2, True),
    Case("encoder DP4, language TP2 DP2, distributed", "colocated", _DP4, _TP2_DP2, True, _SHARED),
    Case("1 + 1", "heterogeneous", _ONE, _ONE),
    Case("1 + 1, uneven", "heterogeneous", _ONE, _ONE, True),
    Case("1 + PP2", "heterogeneous", _ONE, _PP2, True),
    Case("1 + DP2", "heterogeneous", _ONE, _DP2, True),
    Case("TP2 + PP2", "heterogeneous", _TP2, _PP2, True),
    Case("DP2 + TP2, distributed", "heterogeneous", _DP2, _TP2, True, _SHARED),
    Case("DP2 + DP2, frozen tower", "heterogeneous", _DP2, _DP2, True, ("frozen",)),
    Case("1 + PP2, bf16", "heterogeneous", _ONE, _PP2, True, subject="bf16"),
    Case(
        "DP2 + TP2 SP, bf16, distributed",
        "heterogeneous",
        _DP2,
        _TP2,
        True,
        ("sequence_parallel", *_SHARED),
        subject="bf16",
    ),
    Case("1 + DP2 EP2, mixture of experts", "heterogeneous", _ONE, _DP2, True, subject="experts", experts=2),
    Case("DP2 + PP2, Qwen2-VL", "heterogeneous", _DP2, _PP2, True, subject="Qwen2-VL"),
    Case("DP2 + 1, settings by module", "heterogeneous", _DP2, _ONE, True, ("rates",)),
    Case("DP2 + TP2 SP, Qwen2.5-VL", "heterogeneous", _DP2, _TP2, True, ("sequence_parallel",), subject="Qwen2.5-VL"),
    Case("one rank, packed", "homogeneous", _ONE, _ONE, True, ("packed",)),
    Case("one rank, Qwen2.5-VL, packed", "homogeneous", _ONE, _ONE, True, ("packed",), subject="Qwen2.5-VL"),
    Case("PP2, Qwen2-VL, packed", "homogeneous", _PP2, _PP2, True, ("packed",), subject="Qwen2-VL"),
    Case("encoder TP2, language DP2, packed", "colocated", _TP2, _DP2, True, ("packed",)),
    Case(
        "encoder DP4, language TP2 SP DP2, Qwen2.5-VL, packed",
        "colocated",
        _DP4,
        _TP2_DP2,
        True,
        ("sequence_parallel", "packed"),
        subject="Qwen2.5-VL",
    ),
    Case("1 + PP2, packed", "heterogeneous", _ONE, _PP2, True, ("packed",)),
    Case("1 + DP2 EP2, mixture of experts, packed", "heterogeneous", _ONE, _DP2, True, ("packed",), "experts", 2),
    Case(
        "DP2 + TP2 SP, packed, distributed",
        "heterogeneous",
        _DP2,
        _TP2,
        True,
        ("sequence_parallel", "packed", *_SHARED),
    ),
    Case("DP2 + 1, packed", "heterogeneous", _DP2, _ONE, True, ("packed",)),
    Case("CP2, Qwen2.5-VL", "homogeneous", _ONE, _ONE, True, subject=_QWEN, context=2),
    Case("TP2 SP CP2, Qwen2.5-VL, packed", "homogeneous", _TP2, _TP2, True, _SP_PACKED, _QWEN, context=2),
    Case("CP2 PP2, Qwen2-VL", "homogeneous", _PP2, _PP2, True, subject="Qwen2-VL", context=2),
    Case("encoder DP2, language CP2", "colocated", _DP2, _ONE, context=2),
    Case("encoder TP2, language CP2", "colocated", _TP2, _ONE, True, context=2),
    Case("encoder DP2, language CP2, frozen tower, distributed", "colocated", _DP2, _ONE, True, _FROZEN, context=2),
    Case("encoder DP2, language CP2, frozen language model", "colocated", _DP2, _ONE, True, _STILL, context=2),
    Case("encoder DP2, language CP2, bf16", "colocated", _DP2, _ONE, True, subject="bf16", context=2),
    Case("encoder DP2, language CP2 EP2, mixture of experts", "colocated", _DP2, _ONE, True, (), "experts", 2, 2),
    Case("encoder DP4, language TP2 SP CP2", "colocated", _DP4, _TP2, True, ("sequence_parallel",), context=2),
    Case("encoder DP4, language CP2 DP2, packed, distributed", "colocated", _DP4, _DP2, True, _PACKED, context=2),
    Case("encoder DP4, language CP4, packed", "colocated", _DP4, _ONE, True, ("packed",), context=4),
    Case("encoder TP2 DP2, language CP2 DP2", "colocated", _TP2_DP2, _DP2, True, context=2),
    Case("encoder TP4, language CP2 DP2, packed", "colocated", _TP4, _DP2, True, ("packed",), context=2),
    Case("encoder DP2, language CP2, Qwen2.5-VL", "colocated", _DP2, _ONE, True, (), _QWEN, context=2),
    Case(
        "encoder DP4, language TP2 SP CP2, Qwen2.5-VL, packed", "colocated", _DP4, _TP2, True, _SP_PACKED, _QWEN, 1, 2
    ),
    Case("1 + CP2", "heterogeneous", _ONE, _ONE, True, context=2),
    Case("1 + CP2, packed", "heterogeneous", _ONE, _ONE, True, ("packed",), context=2),
    Case("1 + CP2, frozen language model", "heterogeneous", _ONE, _ONE, True, _STILL, context=2),
    Case("1 + CP2 EP2, mixture of experts", "heterogeneous", _ONE, _ONE, True, (), "experts", 2, 2),
    Case("TP2 + CP2", "heterogeneous", _TP2, _ONE, True, context=2),
    Case("1 + CP2 PP2", "heterogeneous", _ONE, _PP2, True, context=2),
    Case("1 + CP2 PP2, Qwen2.5-VL, packed", "heterogeneous", _ONE, _PP2, True, ("packed",), _QWEN, context=2),
    Case("DP2 + CP2, frozen tower, distributed", "heterogeneous", _DP2, _ONE, True, _FROZEN, context=2),
    Case("DP2 + CP2, packed, distributed", "heterogeneous", _DP2, _ONE, True, _PACKED, context=2),
    Case("DP2 + CP2, Qwen2.5-VL, packed", "heterogeneous", _DP2, _ONE, True, ("packed",), _QWEN, context=2),
    Case("one rank, ViT", "homogeneous", _ONE, _ONE, True, ("vit",)),
    Case("one rank, ViT of SigLIP", "homogeneous", _ONE, _ONE, True, ("vit",), subject="SigLIP"),
    Case("TP2 SP, ViT, distributed", "homogeneous", _TP2, _TP2, True, ("vit", "sequence_parallel", *_SHARED)),
    Case("TP2 PP2, ViT", "homogeneous", _TP2_PP2, _TP2_PP2, True, ("vit",)),
    Case("TP2 CP2, ViT", "homogeneous", _TP2, _TP2, True, ("vit",), context=2),
    Case("encoder DP2, language TP2 SP, ViT", "colocated", _DP2, _TP2, True, ("vit", "sequence_parallel")),
    Case("encoder TP2, language DP2, ViT, bf16", "colocated", _TP2, _DP2, True, ("vit",), subject="bf16"),
    Case("encoder TP2, language DP2, ViT, packed", "colocated", _TP2, _DP2, True, ("vit", "packed")),
    Case("encoder TP2, language DP2, ViT, settings by module", "colocated", _TP2, _DP2, True, ("vit", "rates")),
    Case("encoder TP2, language CP2, ViT", "colocated", _TP2, _ONE, True, ("vit",), context=2),
    Case("encoder TP2 DP2, language DP4, ViT", "colocated", _TP2_DP2, _DP4, True, ("vit",)),
    Case("TP2 + PP2, ViT, frozen tower", "heterogeneous", _TP2, _PP2, True, ("vit", "frozen")),
    Case("TP2 + TP2 SP, ViT, distributed", "heterogeneous", _TP2, _TP2, True, ("vit", "sequence_parallel", *_SHARED)),
    Case("DP2 + 1, ViT of SigLIP", "heterogeneous", _DP2, _ONE, True, ("vit",), subject="SigLIP"),
    Case("encoder DP2, language TP2 SP, adapters", "colocated", _DP2, _TP2, True, ("adapters", "sequence_parallel")),
    Case("DP2 + 1, adapters on the encoder", "heterogeneous", _DP2, _ONE, True, ("encoder_adapters",)),
    Case("PP2, adapters", "homogeneous", _PP2, _PP2, True, ("adapters",)),
    Case("encoder TP2, language DP2, adapters, distributed", "colocated", _TP2, _DP2, True, ("adapters", *_SHARED)),
    Case("1 + PP2, adapters, Qwen2.5-VL", "heterogeneous", _ONE, _PP2, True, ("adapters",), "Qwen2.5-VL"),
    Case("TP2 SP, adapters", "homogeneous", _TP2, _TP2, True, ("adapters", "sequence_parallel")),
    Case("TP2, adapters, bf16", "homogeneous", _TP2, _TP2, True, ("adapters",), "bf16"),
    Case("DP2, DoRA, Qwen2.5-VL", "homogeneous", _DP2, _DP2, True, ("dora",), "Qwen2.5-VL"),
    Case("CP2, packed, adapters", "homogeneous", _ONE, _ONE, True, ("packed", "adapters"), context=2),
    Case("encoder DP4, language TP2 DP2, adapters", "colocated", _DP4, _TP2_DP2, True, ("adapters",)),
    Case("encoder TP4, language TP2 DP2, adapters", "colocated", _TP4, _TP2_DP2, True, ("adapters",)),
    Case("DP2 + TP2, DoRA, distributed", "heterogeneous", _DP2, _TP2, True, ("dora", *_SHARED)),
    Case("encoder DP4, language CP2 DP2, adapters", "colocated", _DP4, _DP2, True, ("adapters",), context=2),
    Case("TP2 SP, ViT, adapters", "homogeneous", _TP2, _TP2, True, ("adapters", "vit", "sequence_parallel")),
    Case("encoder TP2, language DP2, ViT, adapters", "colocated", _TP2, _DP2, True, ("adapters", "vit")),
    Case("TP2 + 1, ViT, adapters, distributed", "heterogeneous", _TP2, _ONE, True, ("adapters", "vit", *_SHARED)),
    Case("TP2 + PP2, adapters", "heterogeneous", _TP2, _PP2, True, ("adapters",)),
)
