"""Hy3 of Tencent (2026)."""

from collections.abc import Sequence
from typing import Any

from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.errors import BridgeError
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.moe import MoEBridge
from megatron.bridge.models.routing import balancing, sigmoid_routing

_HF_MLP = "model.layers.{l}.mlp"


class HYV3Bridge(MoEBridge):
    """`HYV3ForCausalLM`: sigmoid routing, shared experts, and a norm on every query and key.

    Layers for multi-token prediction have no rules: a checkpoint that holds them is refused, naming them.
    """

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    output_bias = qkv_bias

    def qk_norm(self) -> bool:
        return True

    def moe_layers(self) -> Sequence[bool]:
        return [kind == "sparse" for kind in self.hf_config.mlp_layer_types]

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        if config.mlp_bias:
            raise BridgeError("config.json: mlp_bias=True, and Megatron-Core's shared experts have no biases")
        return {
            **sigmoid_routing(config.num_experts_per_tok, normalised=True, scaling=config.router_scaling_factor),
            # The bias is what balances the experts.
            **balancing(None),
            "moe_shared_expert_intermediate_size": config.moe_intermediate_size * config.num_shared_experts,
        }

    def moe_rules(self) -> list[WeightRule]:
        router = moe.router(f"{_HF_MLP}.router.gate", selection_bias=f"{_HF_MLP}.expert_bias")
        return [*moe.moe_norm(), *router, *moe.shared_experts(f"{_HF_MLP}.shared_mlp"), *moe.experts()]
