"""Pieces of weight tables for state-space layers and linear attention; see `fragments` for the rest."""

from collections.abc import Sequence

from megatron.bridge.conversion.shards import COLUMN, ROW, Blocks
from megatron.bridge.conversion.table import WeightRule

_LAYER = "decoder.layers.{l}"


def mamba2(hf: str, *, heads: int, channels: int, groups: int, state: int, norm: bool = True) -> list[WeightRule]:
    """A Mamba-2 mixer. Both sides have the blocks z, x, B, C and dt in one projection, and x, B, C in the convolution.

    Args:
        hf: the mixer's Hugging Face name.
        heads: of the state-space model.
        channels: of x over all heads.
        groups: of heads, each with its own B and C.
        state: size of a head's state.
        norm: whether a norm stands before the last projection.
    """
    own, shared = f"{_LAYER}.mixer", groups * state
    convolved = (channels, shared, shared)
    rules = [
        WeightRule(f"{own}.in_proj.weight", f"{hf}.in_proj.weight", shard=Blocks(0, (channels, *convolved, heads))),
        WeightRule(f"{own}.conv1d_weight", f"{hf}.conv1d.weight", shard=Blocks(0, convolved)),
        WeightRule(f"{own}.conv1d_bias", f"{hf}.conv1d.bias", shard=Blocks(0, convolved)),
        *(WeightRule(f"{own}.{name}", f"{hf}.{name}", shard=COLUMN) for name in ("A_log", "D", "dt_bias")),
        WeightRule(f"{own}.out_proj.weight", f"{hf}.out_proj.weight", shard=ROW),
    ]
    return [*rules, WeightRule(f"{own}.norm.weight", f"{hf}.norm.weight", shard=COLUMN)] if norm else rules


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
