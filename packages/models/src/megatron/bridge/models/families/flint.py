"""Flint of Recursive (2026)."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.dense import windows_by_layer_type
from megatron.bridge.models.families.qwen3_moe import Qwen3MoeBridge
from megatron.bridge.models.fragments import HFNames
from megatron.bridge.models.routing import balancing, sigmoid_of_chosen


class FlintBridge(Qwen3MoeBridge):
    """`FlintForCausalLM`: Qwen3's mixture with sigmoid routing, a shared expert, sinks, and rotation beside windows."""

    names = HFNames(sinks="self_attn.softmax_offset")

    def windows(self) -> Sequence[int | None]:
        return windows_by_layer_type(self.hf_config)

    def differences(self) -> Mapping[str, Any]:
        return {
            "softmax_type": "learnable",
            "no_rope_freq": [int(window is None) for window in self.windows()],
            "router_fp32": True,
        }

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        return {
            **sigmoid_of_chosen(config.num_experts_per_tok, normalised=config.norm_topk_prob),
            **balancing(config.router_aux_loss_coef),
            "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        }

    def moe_rules(self) -> list[WeightRule]:
        shared = moe.shared_experts("model.layers.{l}.mlp.shared_expert")
        return [*moe.moe_norm(), *moe.router(keeps_dtype=True), *shared, *moe.experts()]
