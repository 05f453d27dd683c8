"""Qwen3-30B-A3B, Qwen3-235B-A22B and Qwen3-Coder (arXiv:2505.09388)."""

from collections.abc import Sequence
from typing import Any

from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.qwen2_moe import Qwen2MoeBridge
from megatron.bridge.models.routing import balancing, softmax_routing


class Qwen3MoeBridge(Qwen2MoeBridge):
    """`Qwen3MoeForCausalLM`: Qwen3's attention, and no shared expert."""

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    def output_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    def qk_norm(self) -> bool:
        return True

    def windows(self) -> Sequence[int | None]:
        return [self.hf_config.sliding_window] * self.hf_config.num_hidden_layers

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        return {
            **softmax_routing(config.num_experts_per_tok, normalised=config.norm_topk_prob),
            **balancing(config.router_aux_loss_coef),
        }

    def moe_rules(self) -> list[WeightRule]:
        return [*moe.moe_norm(), *moe.router(), *moe.experts()]
