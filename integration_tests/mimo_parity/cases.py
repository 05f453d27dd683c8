"""The placements that are compared with transformers."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One placement and what else is set.

    Attributes:
        name: in tables.
        mode: the deployment mode.
        encoder, language: (tensor, pipeline, data) sizes.
        uneven: samples with 0 to 2 images.
        settings: `sequence_parallel`, `distributed`, `overlap`, `frozen`.
    """

    name: str
    mode: str
    encoder: tuple[int, int, int]
    language: tuple[int, int, int]
    uneven: bool = False
    settings: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """How many ranks it takes."""
        sizes = [a * b * c for a, b, c in (self.encoder, self.language)]
        return sum(sizes) if self.mode == "heterogeneous" else sizes[1]

    def placement(self) -> Any:
        """The placement."""
        from megatron.bridge.mimo import MimoParallelismConfig, ModuleParallelismConfig

        names = ("tensor_parallel", "pipeline_parallel", "data_parallel")
        encoder = ModuleParallelismConfig(**dict(zip(names, self.encoder, strict=True)))
        language = ModuleParallelismConfig(**dict(zip(names, self.language, strict=True)))
        if self.mode == "heterogeneous":
            language.rank_offset = encoder.total_ranks
        return MimoParallelismConfig(
            llm_module_name="language_module",
            deployment_mode=self.mode,
            module_parallelisms={"images": encoder, "language_module": language},
        )


_ONE, _TP2, _PP2, _DP2 = (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)
_TP4, _DP4, _TP2_DP2, _TP2_PP2 = (4, 1, 1), (1, 1, 4), (2, 1, 2), (2, 2, 1)
_SHARED = ("distributed", "overlap")

# Those of every run of the tests: some of each mode, of one to three ranks.
QUICK = (
    Case("one rank", "homogeneous", _ONE, _ONE, uneven=True),
    Case("TP2", "homogeneous", _TP2, _TP2),
    Case("PP2, tied embeddings", "homogeneous", _PP2, _PP2, True, ("tied",)),
    Case("encoder DP2, language TP2 SP", "colocated", _DP2, _TP2, True, ("sequence_parallel",)),
    Case("encoder TP2, language DP2", "colocated", _TP2, _DP2, True),
    Case("encoder DP2, language TP2, distributed", "colocated", _DP2, _TP2, True, ("frozen", *_SHARED)),
    Case("1 + 1, frozen tower", "heterogeneous", _ONE, _ONE, True, ("frozen",)),
    Case("1 + PP2, tied embeddings", "heterogeneous", _ONE, _PP2, True, ("tied",)),
    Case("DP2 + 1", "heterogeneous", _DP2, _ONE, True),
    Case("1 + TP2 SP", "heterogeneous", _ONE, _TP2, True, ("sequence_parallel",)),
)
# The rest of the table.
WIDE = (
    Case("DP2", "homogeneous", _DP2, _DP2, True),
    Case("PP2", "homogeneous", _PP2, _PP2, True),
    Case("TP2 SP, distributed", "homogeneous", _TP2, _TP2, True, ("sequence_parallel", *_SHARED)),
    Case("TP2 PP2", "homogeneous", _TP2_PP2, _TP2_PP2, True),
    Case("encoder DP2, language TP2", "colocated", _DP2, _TP2),
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
)
