"""Mixtures of experts routed as in DeepSeek-V3 (arXiv:2412.19437): sigmoid, a bias per expert, shared experts."""

from collections.abc import Mapping
from typing import Any, ClassVar

from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.dense import SHARED_FIELDS
from megatron.bridge.models.families.moe import MoEBridge
from megatron.bridge.models.routing import balancing, sigmoid_routing


class SigmoidMoEBridge(MoEBridge):
    """A decoder with such mixtures; subclasses say where their attention and their configuration differ."""

    shared_fields: ClassVar[Mapping[str, str]] = {
        **SHARED_FIELDS,
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "num_moe_experts": "n_routed_experts",
    }

    selection_bias: ClassVar[str | None] = "model.layers.{l}.mlp.gate.e_score_correction_bias"

    def num_shared_experts(self) -> int:
        return int(self.hf_config.n_shared_experts)

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    def routing(self) -> dict[str, Any]:
        """Provider fields of how experts are chosen and weighed."""
        config = self.hf_config
        return sigmoid_routing(
            config.num_experts_per_tok,
            normalised=config.norm_topk_prob,
            scaling=config.routed_scaling_factor,
            groups=config.n_group,
            chosen_groups=config.topk_group,
        )

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        return {
            **self.routing(),
            # The bias is what balances the experts.
            **balancing(None),
            "moe_shared_expert_intermediate_size": config.moe_intermediate_size * self.num_shared_experts(),
        }

    def moe_rules(self) -> list[WeightRule]:
        router = moe.router(selection_bias=self.selection_bias)
        return [*moe.moe_norm(), *router, *moe.shared_experts(), *moe.experts()]
