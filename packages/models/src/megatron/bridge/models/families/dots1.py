"""dots.llm1 (arXiv:2506.05767)."""

from collections.abc import Sequence
from typing import Any

from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.dense import SHARED_FIELDS
from megatron.bridge.models.families.moe import MoEBridge, after_dense_prefix
from megatron.bridge.models.routing import balancing, sigmoid_routing


class Dots1Bridge(MoEBridge):
    """`Dots1ForCausalLM`: a dense prefix, sigmoid routing with a bias per expert, shared experts, qk-norm."""

    shared_fields = SHARED_FIELDS | {
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "num_moe_experts": "n_routed_experts",
    }

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    def output_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    def qk_norm(self) -> bool:
        return True

    def windows(self) -> Sequence[int | None]:
        config = self.hf_config
        return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]

    def moe_layers(self) -> Sequence[bool]:
        return after_dense_prefix(self)

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        return {
            **sigmoid_routing(
                config.num_experts_per_tok,
                normalised=config.norm_topk_prob,
                scaling=config.routed_scaling_factor,
                groups=config.n_group,
                chosen_groups=config.topk_group,
            ),
            # The bias is what balances the experts.
            **balancing(None),
            "moe_shared_expert_intermediate_size": config.moe_intermediate_size * config.n_shared_experts,
        }

    def moe_rules(self) -> list[WeightRule]:
        router = moe.router(selection_bias="e_score_correction_bias")
        return [*moe.moe_norm(), *router, *moe.shared_experts(), *moe.experts()]
