"""Pieces of weight tables for multi-latent attention (arXiv:2405.04434); see `fragments` for the rest."""

from megatron.bridge.conversion.shards import COLUMN, ROW
from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.conversion.transforms import Identity, PermuteRows, Transform
from megatron.bridge.models.fragments import LLAMA_NAMES, HFNames


def latent_attention(
    *,
    query_latent: bool,
    kept: int,
    kv_latent: int,
    rotated: int,
    interleaved: bool,
    names: HFNames = LLAMA_NAMES,
) -> list[WeightRule]:
    """Attention whose keys and values, and perhaps queries, come from latents.

    Args:
        query_latent: queries come from a latent too.
        kept: channels of a query or key head that RoPE leaves alone.
        kv_latent: channels of the latent that keys and values come from.
        rotated: channels of a head that RoPE turns, last in a query head and last in what is projected to the latent.
        interleaved: channels 2i and 2i + 1 turn together, as in Megatron-Core; otherwise i and i + rotated / 2.
        names: of the Hugging Face modules; those of attention itself are DeepSeek's.
    """
    own, hf = "decoder.layers.{l}.self_attention", f"{names.layer}.self_attn"
    queries, keys = (_pairing(size, rotated, interleaved) for size in (kept, kv_latent))
    if query_latent:
        rules = [
            WeightRule(f"{own}.linear_q_down_proj.weight", f"{hf}.q_a_proj.weight", shard=COLUMN),
            WeightRule(f"{own}.linear_q_up_proj.layer_norm_weight", f"{hf}.q_a_layernorm.weight"),
            WeightRule(f"{own}.linear_q_up_proj.weight", f"{hf}.q_b_proj.weight", queries, COLUMN),
        ]
    else:
        rules = [WeightRule(f"{own}.linear_q_proj.weight", f"{hf}.q_proj.weight", queries, COLUMN)]
    return [
        *rules,
        WeightRule(f"{own}.linear_kv_down_proj.weight", f"{hf}.kv_a_proj_with_mqa.weight", keys, COLUMN),
        WeightRule(f"{own}.linear_kv_up_proj.layer_norm_weight", f"{hf}.kv_a_layernorm.weight"),
        WeightRule(f"{own}.linear_kv_up_proj.weight", f"{hf}.kv_b_proj.weight", shard=COLUMN),
        WeightRule(f"{own}.linear_proj.weight", f"{names.layer}.{names.attention_output}.weight", shard=ROW),
    ]


def _pairing(kept: int, rotated: int, interleaved: bool) -> Transform:
    """`kept` rows as they are, then `rotated` rows so that those which turn together stand together."""
    if interleaved:
        return Identity()
    half = rotated // 2
    pairs = [kept + row for index in range(half) for row in (index, half + index)]
    return PermuteRows((*range(kept), *pairs))


def latent_pre_norms(names: HFNames = LLAMA_NAMES) -> list[WeightRule]:
    """The norms before attention, which here feeds two projections and is a module of its own, and before the MLP."""
    layer = "decoder.layers.{l}"
    return [
        WeightRule(f"{layer}.input_layernorm.weight", f"{names.layer}.{names.input_norm}.weight"),
        WeightRule(f"{layer}.mlp.linear_fc1.layer_norm_weight", f"{names.layer}.{names.mlp_norm}.weight"),
    ]
