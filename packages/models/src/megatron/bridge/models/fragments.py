"""Pieces of weight tables that families share.

Hugging Face names follow the Llama layout unless a family gives others; Megatron names are those of its checkpoints.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron.bridge.conversion.shards import COLUMN, GATED_COLUMN, ROW
from megatron.bridge.conversion.table import Tied, WeightRule
from megatron.bridge.conversion.transforms import (
    Concatenate,
    Identity,
    InterleaveGroups,
    PadRows,
    Stacked,
    Transform,
    Transposed,
)

_LAYER = "decoder.layers.{l}"
_AS_IT_IS = Identity()
WEIGHT = ("weight",)
WEIGHT_AND_BIAS = ("weight", "bias")


@dataclass(frozen=True, kw_only=True)
class HFNames:
    """A family's Hugging Face module names; those below `layer` are relative to it. The defaults are Llama's.

    Args:
        qkv: modules of q, k and v, or the one module that holds them.
        grouped_qkv: the one module holds them group by group, as Megatron does; otherwise one after another.
        fc1: modules of gate and up projection, the one that holds both, or the up projection where nothing gates.
        conv1d: matrices are stored `[in, out]`.
    """

    embedding: str = "model.embed_tokens"
    positions: str | None = None
    embedding_norm: str | None = None
    layer: str = "model.layers.{l}"
    final_norm: str = "model.norm"
    output: str = "lm_head"
    input_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention_post_norm: str = "post_attention_layernorm"
    mlp_post_norm: str = "post_feedforward_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    grouped_qkv: bool = False
    attention_output: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"
    fc1: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    fc2: str = "mlp.down_proj"
    conv1d: bool = False

    def matrix(self, kind: str, transform: Transform = _AS_IT_IS) -> Transform:
        """The transform of a projection's weight or bias, given the one on `[out, in]`."""
        return Transposed(transform) if self.conv1d and kind == "weight" else transform


LLAMA_NAMES = HFNames()


def at_layers(rules: Iterable[WeightRule], layers: Iterable[int]) -> list[WeightRule]:
    """The rules for some layers only, where others have rules of their own for the same weights."""
    some = f"{{l={','.join(map(str, layers))}}}"
    return [
        replace(
            rule,
            megatron=rule.megatron.replace("{l}", some),
            hf=tuple(name.replace("{l}", some) for name in rule.hf_names),
        )
        for rule in rules
    ]


def embedding(vocab_size: int, names: HFNames = LLAMA_NAMES, norm: tuple[str, ...] = WEIGHT) -> list[WeightRule]:
    """The token embedding, cut along the vocabulary, and learned positions and a norm where there are any."""
    rules = [WeightRule("embedding.word_embeddings.weight", f"{names.embedding}.weight", PadRows(vocab_size), COLUMN)]
    if names.positions is not None:
        rules.append(WeightRule("embedding.position_embeddings.weight", f"{names.positions}.weight"))
    if names.embedding_norm is not None:
        rules += [WeightRule(f"embedding.layernorm.{kind}", f"{names.embedding_norm}.{kind}") for kind in norm]
    return rules


def head(
    vocab_size: int,
    *,
    tied: bool,
    norm: tuple[str, ...] = WEIGHT,
    bias: bool = False,
    own_norm: str = "decoder.final_layernorm",
    names: HFNames = LLAMA_NAMES,
) -> list[WeightRule]:
    """The final norm, and the output layer where it is a weight of its own; `own_norm` is Megatron's name of the norm.

    Hybrid models have another name for it than GPT models.
    """
    rules = [WeightRule(f"{own_norm}.{kind}", f"{names.final_norm}.{kind}") for kind in norm]
    kinds = (() if tied else ("weight",)) + (("bias",) if bias else ())
    for kind in kinds:
        rules.append(WeightRule(f"output_layer.{kind}", f"{names.output}.{kind}", PadRows(vocab_size), COLUMN))
    return rules


def tied_head(*, tied: bool, names: HFNames = LLAMA_NAMES) -> list[Tied]:
    """`lm_head.weight` as a repetition of the embedding, for files that hold it all the same."""
    return [Tied(f"{names.output}.weight", f"{names.embedding}.weight")] if tied else []


def pre_norms(
    kinds: tuple[str, ...] = WEIGHT, *, shared: bool = False, names: HFNames = LLAMA_NAMES
) -> list[WeightRule]:
    """The norms before attention and before the MLP; Megatron counts them as part of the layers they feed.

    Args:
        kinds: the norms' parameters.
        shared: the MLP reads attention's norm and has none of its own.
        names: of the Hugging Face modules.
    """
    places = {"self_attention.linear_qkv": names.input_norm, "mlp.linear_fc1": names.mlp_norm}
    if shared:
        places.pop("mlp.linear_fc1")
    return [
        WeightRule(f"{_LAYER}.{own}.layer_norm_{kind}", f"{names.layer}.{hf}.{kind}")
        for own, hf in places.items()
        for kind in kinds
    ]


def post_norms(kinds: tuple[str, ...] = WEIGHT, *, names: HFNames = LLAMA_NAMES) -> list[WeightRule]:
    """The norms behind attention and behind the MLP; Megatron counts them as part of the layers they follow."""
    places = {"self_attention.linear_proj": names.attention_post_norm, "mlp.linear_fc2": names.mlp_post_norm}
    return [
        WeightRule(f"{_LAYER}.{own}.post_layernorm.{kind}", f"{names.layer}.{hf}.{kind}")
        for own, hf in places.items()
        for kind in kinds
    ]


def attention(
    *,
    heads: int,
    groups: int,
    head_dim: int,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: bool = False,
    qk_norm_kinds: tuple[str, ...] = WEIGHT,
    qk_norm_after_rope: bool = False,
    fused: Transform | None = None,
    names: HFNames = LLAMA_NAMES,
) -> list[WeightRule]:
    """Grouped-query attention.

    Args:
        heads: query heads.
        groups: key/value heads.
        head_dim: channels per head.
        qkv_bias, output_bias: whether the projections have biases.
        qk_norm: a norm over each query's and key's channels.
        qk_norm_kinds: that norm's parameters.
        qk_norm_after_rope: that norm follows the rotation.
        fused: how one weight holds q, k and v, where the names do not say it.
        names: of the Hugging Face modules.
    """
    separate = InterleaveGroups((heads // groups * head_dim, head_dim, head_dim))
    if fused is None and len(names.qkv) == 1:
        fused = Identity() if names.grouped_qkv else Stacked(separate)
    layout = fused or separate
    hf = names.layer
    own = f"{_LAYER}.self_attention"

    def qkv(kind: str) -> WeightRule:
        sources = tuple(f"{hf}.{name}.{kind}" for name in names.qkv)
        return WeightRule(f"{own}.linear_qkv.{kind}", sources, names.matrix(kind, layout), COLUMN)

    output = f"{hf}.{names.attention_output}"
    rules = [qkv("weight"), WeightRule(f"{own}.linear_proj.weight", f"{output}.weight", names.matrix("weight"), ROW)]
    if qkv_bias:
        rules.append(qkv("bias"))
    if output_bias:
        rules.append(WeightRule(f"{own}.linear_proj.bias", f"{output}.bias"))
    if qk_norm:
        place = f"{own}.core_attention" if qk_norm_after_rope else own
        for part, name in (("q", names.q_norm), ("k", names.k_norm)):
            rules += [WeightRule(f"{place}.{part}_layernorm.{kind}", f"{hf}.{name}.{kind}") for kind in qk_norm_kinds]
    return rules


def sinks(names: HFNames = LLAMA_NAMES) -> list[WeightRule]:
    """The sink of each query head: a score that takes its part of the softmax and gives nothing."""
    own = f"{_LAYER}.self_attention.core_attention.softmax_offset"
    return [WeightRule(own, f"{names.layer}.{names.sinks}", shard=COLUMN)]


def gated_mlp(*, bias: bool = False, names: HFNames = LLAMA_NAMES) -> list[WeightRule]:
    """A gated MLP: gate and up projections side by side in Megatron's first layer, down in its second."""
    own = f"{_LAYER}.mlp"

    def gate_up(kind: str) -> WeightRule:
        sources = tuple(f"{names.layer}.{name}.{kind}" for name in names.fc1)
        transform: Transform = Concatenate(2) if len(sources) == 2 else Identity()
        return WeightRule(f"{own}.linear_fc1.{kind}", sources, names.matrix(kind, transform), GATED_COLUMN)

    rules = [gate_up("weight"), _down(names)]
    if bias:
        rules += [gate_up("bias"), WeightRule(f"{own}.linear_fc2.bias", f"{names.layer}.{names.fc2}.bias")]
    return rules


def plain_mlp(*, bias: bool = False, names: HFNames = LLAMA_NAMES) -> list[WeightRule]:
    """An MLP of two layers without a gate."""
    own, up = f"{_LAYER}.mlp", f"{names.layer}.{names.fc1[-1]}"
    rules = [WeightRule(f"{own}.linear_fc1.weight", f"{up}.weight", names.matrix("weight"), COLUMN), _down(names)]
    if bias:
        rules.append(WeightRule(f"{own}.linear_fc1.bias", f"{up}.bias", shard=COLUMN))
        rules.append(WeightRule(f"{own}.linear_fc2.bias", f"{names.layer}.{names.fc2}.bias"))
    return rules


def _down(names: HFNames) -> WeightRule:
    hf = f"{names.layer}.{names.fc2}.weight"
    return WeightRule(f"{_LAYER}.mlp.linear_fc2.weight", hf, names.matrix("weight"), ROW)
