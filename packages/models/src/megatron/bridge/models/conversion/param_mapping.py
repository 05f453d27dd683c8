"""The established mappings, each a weight rule of ours under another name.

Wildcards: the first `*` of a name is the layer, a second one the expert. How tensor-parallel ranks divide a weight
follows from the mapping's class, or for `AutoMapping` from Megatron-Core's name of the weight's module, so that a table
needs no model. A wrong division does not pass: shapes disagree at two tensor-parallel ranks, and nothing is loaded.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from megatron.bridge.conversion.shards import COLUMN, GATED_COLUMN, REPLICATED, ROW, Blocks, Expert, Replicated
from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.conversion.transforms import (
    Concatenate,
    Identity,
    InterleaveGroups,
    PadRows,
    Stacked,
    Transform,
    Transposed,
)
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.models.gpt_provider import GPTModelProvider

# Other spellings of a weight -> its name in checkpoints. Grouped experts are numbered weights of one module; a layer
# spec without fused norms has them as modules.
_CANONICAL = (
    (re.compile(r"\.mlp\.experts\.(linear_fc[12])\.(weight|bias)\*$"), r".mlp.experts.experts.*.\1.\2"),
    (re.compile(r"\.mlp\.experts\.local_experts\.\*\."), ".mlp.experts.experts.*."),
    (re.compile(r"\.input_layernorm\.(weight|bias)$"), r".self_attention.linear_qkv.layer_norm_\1"),
)
_VOCABULARY = ("word_embeddings", "output_layer")
_COLUMN_PARALLEL = (
    *_VOCABULARY,
    "linear_qkv",
    "linear_q_proj",
    "linear_q_up_proj",
    "linear_kv_up_proj",
    "linear_fc1",
    "eh_proj",
)
_ROW_PARALLEL = ("linear_proj", "linear_fc2")
_REPLICATED = ("position_embeddings", "router", "linear_q_down_proj", "linear_kv_down_proj", "enorm", "hnorm")


def _pattern(name: str) -> str:
    """An established name as a name pattern of ours: `{l}` for the layer's wildcard, `{e}` for the expert's."""
    if "**" in name or name.count("*") > 2:
        raise BridgeError(f"mapping of {name!r}: a name has at most two wildcards, for the layer and for the expert")
    return name.replace("*", "{l}", 1).replace("*", "{e}", 1)


class MegatronParamMapping(ABC):
    """Joins one Megatron weight to one or more Hugging Face weights.

    Args:
        megatron_param: Megatron's name, e.g. `decoder.layers.*.mlp.linear_fc2.weight`.
        hf_param: the Hugging Face name, or several by role.
    """

    def __init__(self, megatron_param: str, hf_param: str | dict[str, str]) -> None:
        self.megatron_param = megatron_param
        self.hf_param = hf_param

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.megatron_param!r}, {self.hf_param!r})"

    @property
    def canonical_name(self) -> str:
        """The weight's name in Megatron checkpoints, as a pattern."""
        name = self.megatron_param
        for spelling, canonical in _CANONICAL:
            name = spelling.sub(canonical, name)
        return _pattern(name)

    def rule(self, provider: "GPTModelProvider") -> WeightRule:
        """This mapping as a weight rule of the model that `provider` builds.

        Raises:
            BridgeError: the mapping cannot be expressed; the message names it.
        """
        name = self.canonical_name
        names = [self.hf_param] if isinstance(self.hf_param, str) else list(self.hf_param.values())
        inner = self.shard(provider)
        patterns = tuple(map(_pattern, names))
        return WeightRule(
            name,
            patterns if len(patterns) > 1 else patterns[0],
            self.transform(provider),
            Expert(inner) if "{e}" in name else inner,
            # A mapping may be there for another variant of the family.
            optional=True,
        )

    @abstractmethod
    def shard(self, provider: "GPTModelProvider") -> Blocks | Replicated:
        """How tensor-parallel ranks divide the weight."""

    def transform(self, provider: "GPTModelProvider") -> Transform:
        """The tensor function between the two sides; rows of the vocabulary are padded."""
        if provider.vocab_size is not None and self._module in _VOCABULARY:
            return PadRows(provider.vocab_size)
        return Identity()

    @property
    def _module(self) -> str:
        """Last name of the module that holds the weight."""
        return self.canonical_name.split(".")[-2]

    @property
    def _kind(self) -> str:
        return self.canonical_name.rpartition(".")[2]

    def _is_gated(self, provider: "GPTModelProvider") -> bool:
        return self._module == "linear_fc1" and provider.gated_linear_unit


class ReplicatedMapping(MegatronParamMapping):
    """A weight that every tensor-parallel rank holds whole."""

    def shard(self, provider: "GPTModelProvider") -> Blocks | Replicated:
        return REPLICATED


class ColumnParallelMapping(MegatronParamMapping):
    """A weight (or its bias) cut along its output axis; of a gated MLP's first layer, gate and up each."""

    def shard(self, provider: "GPTModelProvider") -> Blocks | Replicated:
        return GATED_COLUMN if self._is_gated(provider) else COLUMN


class RowParallelMapping(MegatronParamMapping):
    """A weight cut along its input axis; its bias is whole on every rank."""

    def shard(self, provider: "GPTModelProvider") -> Blocks | Replicated:
        return REPLICATED if self._kind == "bias" else ROW


class AutoMapping(MegatronParamMapping):
    """A weight that is divided as Megatron-Core's module of its name divides it.

    Args:
        megatron_param, hf_param: the two names.
        permute_dims: `(1, 0)` for a matrix that Hugging Face stores transposed.
    """

    _KINDS: ClassVar[tuple[tuple[Sequence[str], type[MegatronParamMapping]], ...]] = (
        (_COLUMN_PARALLEL, ColumnParallelMapping),
        (_ROW_PARALLEL, RowParallelMapping),
        (_REPLICATED, ReplicatedMapping),
    )

    def __init__(self, megatron_param: str, hf_param: str, permute_dims: tuple[int, ...] | None = None) -> None:
        super().__init__(megatron_param, hf_param)
        if permute_dims not in (None, (0, 1), (1, 0)):
            raise BridgeError(f"{self}: permute_dims={permute_dims} is not supported, only (1, 0)")
        self.permute_dims = permute_dims

    def transform(self, provider: "GPTModelProvider") -> Transform:
        inner = super().transform(provider)
        return Transposed(inner) if self.permute_dims == (1, 0) else inner

    def shard(self, provider: "GPTModelProvider") -> Blocks | Replicated:
        # A norm of its own, or one that is fused into the linear layer that follows it.
        if self._kind.startswith("layer_norm_") or "layernorm" in self._module or self._module == "norm":
            return REPLICATED
        for modules, kind in self._KINDS:
            if self._module in modules:
                return kind(self.megatron_param, self.hf_param).shard(provider)
        raise BridgeError(
            f"{self}: how tensor-parallel ranks divide the weights of {self._module!r} is not known; say so with "
            "ReplicatedMapping, ColumnParallelMapping or RowParallelMapping"
        )


class QKVMapping(MegatronParamMapping):
    """Query, key and value projections (or their biases), interleaved by query group in Megatron."""

    def __init__(self, megatron_param: str, q: str, k: str, v: str) -> None:
        super().__init__(megatron_param, {"q": q, "k": k, "v": v})

    def shard(self, provider: "GPTModelProvider") -> Blocks | Replicated:
        return COLUMN

    def transform(self, provider: "GPTModelProvider") -> Transform:
        return _qkv(provider)


class ConcatenatedQKVMapping(MegatronParamMapping):
    """One Hugging Face weight (or bias) that holds queries, keys and values one after another."""

    def __init__(self, megatron_param: str, hf_param: str) -> None:
        super().__init__(megatron_param, hf_param)

    def shard(self, provider: "GPTModelProvider") -> Blocks | Replicated:
        return COLUMN

    def transform(self, provider: "GPTModelProvider") -> Transform:
        return Stacked(_qkv(provider))


class GatedMLPMapping(MegatronParamMapping):
    """Gate and up projections, side by side in Megatron's first layer of a gated MLP."""

    def __init__(self, megatron_param: str, gate: str, up: str) -> None:
        super().__init__(megatron_param, {"gate": gate, "up": up})

    def shard(self, provider: "GPTModelProvider") -> Blocks | Replicated:
        return GATED_COLUMN

    def transform(self, provider: "GPTModelProvider") -> Transform:
        return Concatenate(2)


def _qkv(provider: "GPTModelProvider") -> InterleaveGroups:
    """Rows of one query group: its queries, then one key and one value head."""
    heads = provider.num_attention_heads
    groups = provider.num_query_groups or heads
    channels = provider.kv_channels or provider.hidden_size // heads
    return InterleaveGroups((heads // groups * channels, channels, channels))
