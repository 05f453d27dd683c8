"""Mistral Small 4 of Mistral AI (2026)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.errors import BridgeError
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.deepseek import DeepseekV3Bridge
from megatron.bridge.models.families.ministral import query_temperature
from megatron.bridge.models.routing import softmax_routing


class Mistral4Bridge(DeepseekV3Bridge):
    """`Mistral4ForCausalLM`: DeepSeek-V3 with stacked experts chosen by softmax, and queries that grow slowly."""

    selection_bias = None

    def routing(self) -> dict[str, Any]:
        config = self.hf_config
        if config.topk_group < config.n_group:
            raise BridgeError(
                f"config.json: n_group={config.n_group}, topk_group={config.topk_group}: groups ranked by softmax and "
                "experts weighed within them are not supported in this family"
            )
        return softmax_routing(
            config.num_experts_per_tok, normalised=config.norm_topk_prob, scaling=config.routed_scaling_factor
        )

    def moe_rules(self) -> list[WeightRule]:
        experts = "model.layers.{l}.mlp.experts"
        stacked = moe.stacked_experts(f"{experts}.gate_up_proj", f"{experts}.down_proj")
        return [*moe.moe_norm(), *moe.router(), *moe.shared_experts(), *stacked]

    def differences(self) -> Mapping[str, Any]:
        return {**super().differences(), **query_temperature(self.hf_config)}
