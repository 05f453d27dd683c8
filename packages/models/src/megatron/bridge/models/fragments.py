"""Pieces of weight tables that families share.

Hugging Face names follow the Llama layout unless a family says otherwise; Megatron names are those of its checkpoints.
"""

from megatron.bridge.conversion.shards import COLUMN, GATED_COLUMN, ROW
from megatron.bridge.conversion.table import Tied, WeightRule
from megatron.bridge.conversion.transforms import Concatenate, InterleaveGroups, PadRows

_LAYER = "decoder.layers.{l}"
_HF_LAYER = "model.layers.{l}"


def embedding(vocab_size: int) -> list[WeightRule]:
    """The token embedding, cut along the vocabulary."""
    return [WeightRule("embedding.word_embeddings.weight", "model.embed_tokens.weight", PadRows(vocab_size), COLUMN)]


def head(vocab_size: int, *, tied: bool) -> list[WeightRule]:
    """The final norm, and the output layer where it is a weight of its own."""
    norm = WeightRule("decoder.final_layernorm.weight", "model.norm.weight")
    return [norm] if tied else [norm, WeightRule("output_layer.weight", "lm_head.weight", PadRows(vocab_size), COLUMN)]


def tied_head(*, tied: bool) -> list[Tied]:
    """`lm_head.weight` as a repetition of the embedding, for files that hold it all the same."""
    return [Tied("lm_head.weight", "model.embed_tokens.weight")] if tied else []


def pre_norms() -> list[WeightRule]:
    """The norms before attention and before the MLP; Megatron counts them as part of the layers they feed."""
    return [
        WeightRule(f"{_LAYER}.self_attention.linear_qkv.layer_norm_weight", f"{_HF_LAYER}.input_layernorm.weight"),
        WeightRule(f"{_LAYER}.mlp.linear_fc1.layer_norm_weight", f"{_HF_LAYER}.post_attention_layernorm.weight"),
    ]


def attention(
    *, heads: int, groups: int, head_dim: int, qkv_bias: bool = False, output_bias: bool = False, qk_norm: bool = False
) -> list[WeightRule]:
    """Grouped-query attention with separate q, k, v on the Hugging Face side.

    Args:
        heads: query heads.
        groups: key/value heads.
        head_dim: channels per head.
        qkv_bias, output_bias: whether the projections have biases.
        qk_norm: a norm over each query's and key's channels.
    """
    fused = InterleaveGroups((heads // groups * head_dim, head_dim, head_dim))
    hf = f"{_HF_LAYER}.self_attn"
    own = f"{_LAYER}.self_attention"

    def qkv(kind: str) -> WeightRule:
        return WeightRule(f"{own}.linear_qkv.{kind}", tuple(f"{hf}.{p}_proj.{kind}" for p in "qkv"), fused, COLUMN)

    rules = [qkv("weight"), WeightRule(f"{own}.linear_proj.weight", f"{hf}.o_proj.weight", shard=ROW)]
    if qkv_bias:
        rules.append(qkv("bias"))
    if output_bias:
        rules.append(WeightRule(f"{own}.linear_proj.bias", f"{hf}.o_proj.bias"))
    if qk_norm:
        rules += [WeightRule(f"{own}.{p}_layernorm.weight", f"{hf}.{p}_norm.weight") for p in "qk"]
    return rules


def gated_mlp(*, bias: bool = False) -> list[WeightRule]:
    """A gated MLP: gate and up projections side by side in Megatron's first layer, down in its second."""
    hf, own = f"{_HF_LAYER}.mlp", f"{_LAYER}.mlp"

    def gate_up(kind: str) -> WeightRule:
        names = (f"{hf}.gate_proj.{kind}", f"{hf}.up_proj.{kind}")
        return WeightRule(f"{own}.linear_fc1.{kind}", names, Concatenate(2), GATED_COLUMN)

    rules = [gate_up("weight"), WeightRule(f"{own}.linear_fc2.weight", f"{hf}.down_proj.weight", shard=ROW)]
    if bias:
        rules += [gate_up("bias"), WeightRule(f"{own}.linear_fc2.bias", f"{hf}.down_proj.bias")]
    return rules
