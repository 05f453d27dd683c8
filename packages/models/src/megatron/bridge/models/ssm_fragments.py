"""Pieces of weight tables for state-space layers and linear attention; see `fragments` for the rest."""

from collections.abc import Sequence

from megatron.bridge.conversion.shards import COLUMN, ROW, NamedBlocks
from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.conversion.transforms import GatherRows
from megatron.bridge.models.fragments import WEIGHT_AND_BIAS

_LAYER = "decoder.layers.{l}"


def mamba2(
    hf: str, *, heads: int, channels: int, groups: int, state: int, norm: bool = True, place: str = "mixer"
) -> list[WeightRule]:
    """A Mamba-2 mixer. Both sides have the blocks z, x, B, C and dt in one projection, and x, B, C in the convolution.

    Args:
        hf: the mixer's Hugging Face name.
        heads: of the state-space model.
        channels: of x over all heads.
        groups: of heads, each with its own B and C.
        state: size of a head's state.
        norm: whether a norm stands before the last projection.
        place: Megatron's name of the mixer in its layer.
    """
    own, shared = f"{_LAYER}.{place}", groups * state
    convolved = NamedBlocks(0, (channels, shared, shared), ("x", "B", "C"))
    projected = NamedBlocks(0, (channels, channels, shared, shared, heads), ("z", "x", "B", "C", "dt"))
    rules = [
        WeightRule(f"{own}.in_proj.weight", f"{hf}.in_proj.weight", shard=projected),
        *(WeightRule(f"{own}.conv1d.{kind}", f"{hf}.conv1d.{kind}", shard=convolved) for kind in WEIGHT_AND_BIAS),
        *(WeightRule(f"{own}.{name}", f"{hf}.{name}", shard=COLUMN) for name in ("A_log", "D", "dt_bias")),
        WeightRule(f"{own}.out_proj.weight", f"{hf}.out_proj.weight", shard=ROW),
    ]
    return [*rules, WeightRule(f"{own}.norm.weight", f"{hf}.norm.weight", shard=COLUMN)] if norm else rules


def mamba1(hf: str) -> list[WeightRule]:
    """The first Mamba's mixer; tensor-parallel ranks have channels of their own."""
    own = f"{_LAYER}.mixer"
    return [
        WeightRule(f"{own}.in_proj.weight", f"{hf}.in_proj.weight", shard=NamedBlocks(0, 2, ("x", "z"))),
        *(WeightRule(f"{own}.conv1d.{kind}", f"{hf}.conv1d.{kind}", shard=COLUMN) for kind in WEIGHT_AND_BIAS),
        WeightRule(f"{own}.x_proj_weight", f"{hf}.x_proj.weight", shard=ROW),
        WeightRule(f"{own}.dt_proj_weight", f"{hf}.dt_proj.weight", shard=COLUMN),
        WeightRule(f"{own}.dt_proj_bias", f"{hf}.dt_proj.bias", shard=COLUMN),
        *(WeightRule(f"{own}.{name}", f"{hf}.{name}", shard=COLUMN) for name in ("A_log", "D")),
        WeightRule(f"{own}.out_proj.weight", f"{hf}.out_proj.weight", shard=ROW),
    ]


# Megatron counts the norm before a layer's one part as belonging to the projection behind it.
_NORMS = {
    "M": "mixer.in_proj.layer_norm_weight",
    "*": "self_attention.linear_qkv.layer_norm_weight",
    "-": "mlp.linear_fc1.layer_norm_weight",
    "E": "pre_mlp_layernorm.weight",
}


def layer_norms(kinds: Sequence[str], hf: str) -> list[WeightRule]:
    """The norm of every kind of layer (as in Megatron-Core's `hybrid_layer_pattern`) that the model has."""
    return [WeightRule(f"{_LAYER}.{own}", f"{hf}.weight") for kind, own in _NORMS.items() if kind in kinds]


def gated_delta_net(
    hf: str, inputs: tuple[str, ...], runs: GatherRows, *, key_channels: int, value_channels: int, value_heads: int
) -> list[WeightRule]:
    """A gated delta net. Megatron's first projection has the blocks q, k, v, z, beta and alpha.

    Args:
        hf: the module's Hugging Face name.
        inputs: below it, what Megatron's first projection is made of.
        runs: how.
        key_channels, value_channels: over all heads.
        value_heads: of the model.
    """
    own, qkv = f"{_LAYER}.self_attention", (key_channels, key_channels, value_channels)
    names = ("query", "key", "value")
    projected = NamedBlocks(0, (*qkv, value_channels, value_heads, value_heads), (*names, "z", "beta", "alpha"))
    return [
        WeightRule(f"{own}.in_proj.weight", tuple(f"{hf}.{name}.weight" for name in inputs), runs, projected),
        WeightRule(f"{own}.conv1d.weight", f"{hf}.conv1d.weight", shard=NamedBlocks(0, qkv, names)),
        *(WeightRule(f"{own}.{name}", f"{hf}.{name}", shard=COLUMN) for name in ("A_log", "dt_bias")),
        WeightRule(f"{own}.out_norm.weight", f"{hf}.norm.weight"),
        WeightRule(f"{own}.out_proj.weight", f"{hf}.out_proj.weight", shard=ROW),
    ]


def by_key_head(key_heads: int, sizes: Sequence[Sequence[int]]) -> GatherRows:
    """Runs of projections that hold, key head by key head, a few rows of each block.

    Args:
        key_heads: of the model.
        sizes: per projection, the rows of each block that a key head has.
    """
    return GatherRows(
        tuple(
            (source, head * sum(blocks) + sum(blocks[:index]), rows)
            for source, blocks in enumerate(sizes)
            for index, rows in enumerate(blocks)
            for head in range(key_heads)
        )
    )


def gated_qkv(*, heads: int, groups: int, head_dim: int) -> GatherRows:
    """q (each head's query, then its gate), k and v as Megatron's fused projection: by group, queries, gates, k, v."""
    runs: list[tuple[int, int, int]] = []
    for group in range(groups):
        own = range(group * heads // groups, (group + 1) * heads // groups)
        runs += [(0, 2 * head * head_dim, head_dim) for head in own]
        runs += [(0, (2 * head + 1) * head_dim, head_dim) for head in own]
        runs += [(source, group * head_dim, head_dim) for source in (1, 2)]
    return GatherRows(tuple(runs))
