"""A live Megatron model's weights by canonical name: the name in its distributed checkpoints, whatever the layer spec,
pipeline stage or wrapper.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

from megatron.bridge.conversion.shards import Expert, ShardRule
from megatron.bridge.errors import BridgeError

# Experts as modules of their own (any layer spec), and as numbered weights of one module (Transformer Engine's).
_EXPERT_MODULE = re.compile(r"(.*\.experts)\.local_experts\.(\d+)\.(.+)")
_OUTPUT = "output_layer.weight"
_EXPERT_WEIGHT = re.compile(r"(.*\.experts)\.(linear_fc[12])\.(weight|bias)(\d+)")
# A layer for multi-token prediction: its module, and what checkpoints call it.
_PREDICTION_MODULE, _PREDICTION_KEY = "mtp_model_layer", "transformer_layer"


def unwrap(module: "torch.nn.Module") -> "torch.nn.Module":
    """The model inside Megatron's wrappers (DDP, Float16Module)."""
    while isinstance(inner := getattr(module, "module", None), _module_class()):
        module = inner
    return module


def _module_class() -> "type[torch.nn.Module]":
    import torch

    return torch.nn.Module


def as_chunks(model: "torch.nn.Module | Sequence[torch.nn.Module]") -> "list[torch.nn.Module]":
    """The model's chunks on this rank, unwrapped: one, or one per virtual pipeline stage."""
    chunks: list[torch.nn.Module] = [model] if isinstance(model, _module_class()) else list(model)  # type: ignore[arg-type]
    return [unwrap(chunk) for chunk in chunks]


# Where an adapted layer keeps its adapters, by name: `...linear_qkv.adapters.default.lora_A`.
ADAPTERS = "adapters"


def is_adapter_weight(name: str) -> bool:
    """Whether a weight belongs to an adapter, not to the model beneath."""
    return f".{ADAPTERS}." in name


def canonical_weights(
    chunks: "Sequence[torch.nn.Module]", layout: "Layout | None" = None, *, adapters: bool = False
) -> "dict[str, torch.Tensor]":
    """Every parameter and persistent buffer on this rank by canonical name.

    Args:
        chunks: this rank's, unwrapped.
        layout: as it is, or None to find it.
        adapters: those of the adapters instead of those of the model beneath.

    A tied output layer of the last pipeline stage goes by the embedding's name, as it does in checkpoints; where one
    rank holds both, they are one tensor. Experts go by their number in the whole model:
    `decoder.layers.3.mlp.experts.experts.5.linear_fc1.weight`.
    """
    weights: dict[str, torch.Tensor] = {}
    layout = layout or Layout.of(chunks)
    for chunk in chunks:
        names = CanonicalNames(chunk, layout)
        for name, value in chunk.state_dict(keep_vars=True).items():
            is_weight = isinstance(value, _tensor_class()) and not name.endswith("_extra_state")
            if is_weight and is_adapter_weight(name) == adapters:
                weights[names.canonical(name)] = value
    return weights


def _tensor_class() -> "type[torch.Tensor]":
    import torch

    return torch.Tensor


class CanonicalNames:
    """From a chunk's own names of parameters and modules to canonical ones.

    Args:
        chunk: unwrapped.
        layout: as it is, or None to find it.
    """

    def __init__(self, chunk: Any, layout: "Layout | None" = None) -> None:
        self._prefixes = dict(_layer_prefixes(chunk))
        self._tied = getattr(chunk, "share_embeddings_and_output_weights", False)
        experts = getattr(getattr(chunk, "config", None), "num_moe_experts", None) or 0
        layout = layout or (Layout.of([chunk]) if experts else None)
        self._first_expert = 0 if layout is None else experts // layout.expert_size * layout.expert_rank

    def canonical(self, name: str) -> str:
        """The canonical name of this chunk's `name`."""
        if self._tied and (name == _OUTPUT or name.endswith(f".{_OUTPUT}")):
            return name.removesuffix(_OUTPUT) + "embedding.word_embeddings.weight"
        for prefix, (canonical_prefix, renamed) in self._prefixes.items():
            if name.startswith(prefix):
                inner = name.removeprefix(prefix)
                for own, shared in renamed.items():
                    if inner.startswith(own):
                        inner = shared + inner.removeprefix(own)
                        break
                return canonical_prefix + global_expert(inner, self._first_expert)
        return name


def global_expert(name: str, first: int) -> str:
    """A weight's name with the expert's number in the whole model.

    Args:
        name: as the layer spells it; names of other weights are returned as they are.
        first: the number of this rank's first expert.
    """
    if found := _EXPERT_MODULE.fullmatch(name):
        return f"{found[1]}.experts.{first + int(found[2])}.{found[3]}"
    if found := _EXPERT_WEIGHT.fullmatch(name):
        return f"{found[1]}.experts.{first + int(found[4])}.{found[2]}.{found[3]}"
    return name


def _layer_prefixes(chunk: Any) -> Iterator[tuple[str, tuple[str, dict[str, str]]]]:
    """Per transformer layer: its prefix in this chunk, its canonical prefix, and the renaming its spec declares."""
    for name, module in chunk.named_modules():
        if not (hasattr(module, "layer_number") and hasattr(module, "submodules_config")):
            continue
        parent, _, own = name.rpartition(".")
        renamed = dict(module.submodules_config.sharded_state_dict_keys_map)
        if own.isdigit():
            yield f"{name}.", (f"{parent}.{module.layer_number - 1}.", renamed)
        elif own == _PREDICTION_MODULE:
            yield f"{name}.", (f"{parent}.{_PREDICTION_KEY}.", renamed)


@dataclass(frozen=True)
class Layout:
    """This rank's place among the model's tensor-, pipeline- and expert-parallel ranks."""

    tensor_group: Any
    pipeline_group: Any
    # None where the model was built without groups for experts.
    expert_group: Any = None
    expert_tensor_group: Any = None
    context_group: Any = None

    @classmethod
    def of(cls, chunks: "Sequence[Any]", groups: Any = None) -> "Layout":
        """The layout that the model was built with.

        Args:
            chunks: the model's chunks on this rank, unwrapped.
            groups: the process groups (attributes `tp`, `pp`, and for experts `ep`, `expt_tp`) of a framework that
                keeps its own; None takes those that the model holds, or Megatron-Core's.
        """
        groups = getattr(chunks[0], "pg_collection", None) if groups is None else groups
        if groups is None:
            from megatron.core.process_groups_config import ProcessGroupCollection

            groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "pp", "ep", "expt_tp", "cp"])
        absent = [name for name in ("tp", "pp") if getattr(groups, name, None) is None]
        if absent:
            raise BridgeError(f"the process groups {groups!r} lack {' and '.join(absent)}; give them by these names")
        further = (getattr(groups, name, None) for name in ("ep", "expt_tp", "cp"))
        return cls(groups.tp, groups.pp, *further)

    @property
    def groups(self) -> tuple[Any, ...]:
        """Every group in which weights are exchanged; None for one that the model does not have."""
        return self.tensor_group, self.pipeline_group, self.expert_group, self.expert_tensor_group

    def dividing(self, rule: ShardRule) -> Any:
        """The group whose ranks hold the parts of a weight with this shard rule."""
        return self.expert_tensor_group if isinstance(rule, Expert) else self.tensor_group

    @property
    def context_size(self) -> int:
        return 1 if self.context_group is None else int(self.context_group.size())

    @property
    def tensor_size(self) -> int:
        return int(self.tensor_group.size())

    @property
    def tensor_rank(self) -> int:
        return int(self.tensor_group.rank())

    @property
    def pipeline_size(self) -> int:
        return int(self.pipeline_group.size())

    @property
    def pipeline_rank(self) -> int:
        return int(self.pipeline_group.rank())

    @property
    def expert_size(self) -> int:
        return 1 if self.expert_group is None else int(self.expert_group.size())

    @property
    def expert_rank(self) -> int:
        return 0 if self.expert_group is None else int(self.expert_group.rank())
