"""Pieces of weight tables for mixtures of experts; see `fragments` for the rest.

Megatron names are those of single experts: `decoder.layers.{l}.mlp.experts.experts.{e}.linear_fc1.weight`.
"""

from megatron.bridge.conversion.shards import COLUMN, GATED_COLUMN, REPLICATED, ROW, Expert
from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.conversion.transforms import Alternating, Concatenate, Identity, Transform, Transposed
from megatron.bridge.models.fragments import WEIGHT

_MLP = "decoder.layers.{l}.mlp"
_EXPERT = f"{_MLP}.experts.experts.{{e}}"
_HF_MLP = "model.layers.{l}.mlp"


def moe_norm(
    hf: str = "model.layers.{l}.post_attention_layernorm", kinds: tuple[str, ...] = WEIGHT
) -> list[WeightRule]:
    """The norm before a mixture of experts, which Megatron counts as the layer's own."""
    return [WeightRule(f"decoder.layers.{{l}}.pre_mlp_layernorm.{kind}", f"{hf}.{kind}") for kind in kinds]


def moe_post_norm(hf: str = "model.layers.{l}.post_feedforward_layernorm") -> list[WeightRule]:
    """The norm behind a mixture of experts."""
    return [WeightRule(f"{_MLP}.post_layernorm.weight", f"{hf}.weight")]


def router(
    hf: str = f"{_HF_MLP}.gate", *, selection_bias: str | None = None, keeps_dtype: bool = False
) -> list[WeightRule]:
    """The router.

    Args:
        hf: the module.
        selection_bias: names the bias that takes part in choosing experts only, and is kept in fp32.
        keeps_dtype: so is the router's weight.
    """
    rules = [WeightRule(f"{_MLP}.router.weight", f"{hf}.weight", keeps_dtype=keeps_dtype)]
    if selection_bias is not None:
        rules.append(WeightRule(f"{_MLP}.router.expert_bias", selection_bias, keeps_dtype=True))
    return rules


def experts(
    hf: str = f"{_HF_MLP}.experts.{{e}}", *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> list[WeightRule]:
    """Gated experts, each with weights of its own on the Hugging Face side."""
    names = (f"{hf}.{gate}.weight", f"{hf}.{up}.weight")
    return [
        WeightRule(f"{_EXPERT}.linear_fc1.weight", names, Concatenate(2), Expert(GATED_COLUMN)),
        WeightRule(f"{_EXPERT}.linear_fc2.weight", f"{hf}.{down}.weight", shard=Expert(ROW)),
    ]


def plain_experts(hf: str, *, up: str = "up_proj", down: str = "down_proj") -> list[WeightRule]:
    """Experts without a gate, each with weights of its own on the Hugging Face side."""
    return [
        WeightRule(f"{_EXPERT}.linear_fc1.weight", f"{hf}.{up}.weight", shard=Expert(COLUMN)),
        WeightRule(f"{_EXPERT}.linear_fc2.weight", f"{hf}.{down}.weight", shard=Expert(ROW)),
    ]


def stacked_experts(
    gate_up: str, down: str, *, transposed: bool = False, interleaved: bool = False, bias: str | None = None
) -> list[WeightRule]:
    """Gated experts stacked along a leading axis: `[experts, 2 x ffn, hidden]` and `[experts, hidden, ffn]`.

    Args:
        gate_up, down: names of the stacked weights.
        transposed: they are `[experts, hidden, 2 x ffn]` and `[experts, ffn, hidden]`.
        interleaved: gate and up projection alternate, row by row.
        bias: what the names of the biases `[experts, 2 x ffn]` and `[experts, hidden]` have behind these; None without.
    """
    layout: Transform = Alternating(2) if interleaved else Identity()
    matrix, down_matrix = (Transposed(layout), Transposed()) if transposed else (layout, Identity())
    rules = [
        WeightRule(f"{_EXPERT}.linear_fc1.weight", f"{gate_up}[{{e}}]", matrix, Expert(GATED_COLUMN)),
        WeightRule(f"{_EXPERT}.linear_fc2.weight", f"{down}[{{e}}]", down_matrix, Expert(ROW)),
    ]
    if bias is not None:
        rules += [
            WeightRule(f"{_EXPERT}.linear_fc1.bias", f"{gate_up}{bias}[{{e}}]", layout, Expert(GATED_COLUMN)),
            WeightRule(f"{_EXPERT}.linear_fc2.bias", f"{down}{bias}[{{e}}]", shard=Expert(REPLICATED)),
        ]
    return rules


def shared_experts(
    hf: str = f"{_HF_MLP}.shared_experts",
    *,
    scale: str | None = None,
    fc1: tuple[str, ...] = ("gate_proj", "up_proj"),
    fc2: str = "down_proj",
) -> list[WeightRule]:
    """The experts that see every token, as one gated MLP.

    Args:
        hf: the module.
        scale: the weight that scales them per token, None without.
        fc1: below the module, gate and up projection, or the one that holds both.
        fc2: below the module, the down projection.
    """
    own, names = f"{_MLP}.shared_experts", tuple(f"{hf}.{name}.weight" for name in fc1)
    transform: Transform = Concatenate(2) if len(names) == 2 else Identity()
    rules = [
        WeightRule(f"{own}.linear_fc1.weight", names, transform, GATED_COLUMN),
        WeightRule(f"{own}.linear_fc2.weight", f"{hf}.{fc2}.weight", shard=ROW),
    ]
    return [*rules, WeightRule(f"{own}.gate_weight", scale)] if scale else rules


def plain_shared_experts(hf: str) -> list[WeightRule]:
    """The experts that see every token, as one MLP without a gate."""
    own = f"{_MLP}.shared_experts"
    return [
        WeightRule(f"{own}.linear_fc1.weight", f"{hf}.up_proj.weight", shard=COLUMN),
        WeightRule(f"{own}.linear_fc2.weight", f"{hf}.down_proj.weight", shard=ROW),
    ]
