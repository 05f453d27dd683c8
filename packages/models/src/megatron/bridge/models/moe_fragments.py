"""Pieces of weight tables for mixtures of experts; see `fragments` for the rest.

Megatron names are those of single experts: `decoder.layers.{l}.mlp.experts.experts.{e}.linear_fc1.weight`.
"""

from megatron.bridge.conversion.shards import COLUMN, GATED_COLUMN, ROW, Expert
from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.conversion.transforms import Concatenate

_MLP = "decoder.layers.{l}.mlp"
_EXPERT = f"{_MLP}.experts.experts.{{e}}"
_HF_MLP = "model.layers.{l}.mlp"


def moe_norm(hf: str = "model.layers.{l}.post_attention_layernorm") -> list[WeightRule]:
    """The norm before a mixture of experts, which Megatron counts as the layer's own."""
    return [WeightRule("decoder.layers.{l}.pre_mlp_layernorm.weight", f"{hf}.weight")]


def router(hf: str = f"{_HF_MLP}.gate", *, selection_bias: str | None = None) -> list[WeightRule]:
    """The router; `selection_bias` names the bias that takes part in choosing experts only, and is kept in fp32."""
    rules = [WeightRule(f"{_MLP}.router.weight", f"{hf}.weight")]
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


def stacked_experts(gate_up: str, down: str) -> list[WeightRule]:
    """Gated experts stacked along a leading axis: `[experts, 2 x ffn, hidden]` and `[experts, hidden, ffn]`."""
    return [
        WeightRule(f"{_EXPERT}.linear_fc1.weight", f"{gate_up}[{{e}}]", shard=Expert(GATED_COLUMN)),
        WeightRule(f"{_EXPERT}.linear_fc2.weight", f"{down}[{{e}}]", shard=Expert(ROW)),
    ]


def shared_experts(hf: str = f"{_HF_MLP}.shared_experts", *, scale: str | None = None) -> list[WeightRule]:
    """The experts that see every token, as one gated MLP; `scale` names the weight that scales them per token."""
    own, names = f"{_MLP}.shared_experts", (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight")
    rules = [
        WeightRule(f"{own}.linear_fc1.weight", names, Concatenate(2), GATED_COLUMN),
        WeightRule(f"{own}.linear_fc2.weight", f"{hf}.down_proj.weight", shard=ROW),
    ]
    return [*rules, WeightRule(f"{own}.gate_weight", scale)] if scale else rules


def plain_shared_experts(hf: str) -> list[WeightRule]:
    """The experts that see every token, as one MLP without a gate."""
    own = f"{_MLP}.shared_experts"
    return [
        WeightRule(f"{own}.linear_fc1.weight", f"{hf}.up_proj.weight", shard=COLUMN),
        WeightRule(f"{own}.linear_fc2.weight", f"{hf}.down_proj.weight", shard=ROW),
    ]
