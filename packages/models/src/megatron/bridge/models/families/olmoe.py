"""OLMoE and FlexOlmo of Ai2 (arXiv:2409.02060, arXiv:2507.07024)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.moe import MoEBridge
from megatron.bridge.models.families.olmo import Olmo2Bridge, refuse_clipping
from megatron.bridge.models.routing import balancing, softmax_routing


class FlexOlmoBridge(MoEBridge, Olmo2Bridge):
    """`FlexOlmoForCausalLM`: OLMo 2 with experts in every layer."""

    shared_fields: ClassVar[dict[str, str]] = {**MoEBridge.shared_fields, "moe_ffn_hidden_size": "intermediate_size"}

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        return {
            **softmax_routing(config.num_experts_per_tok, normalised=config.norm_topk_prob),
            **balancing(config.router_aux_loss_coef),
        }

    def moe_rules(self) -> list[WeightRule]:
        return [*moe.moe_post_norm(), *moe.router(), *moe.experts()]


class OlmoeBridge(FlexOlmoBridge):
    """`OlmoeForCausalLM`: norms before attention and experts; its norms of queries and keys are OLMo 2's."""

    def differences(self) -> Mapping[str, Any]:
        refuse_clipping(self.hf_config.clip_qkv)
        return {"qk_norm_over": "projection"}

    def moe_rules(self) -> list[WeightRule]:
        return [*moe.moe_norm(), *moe.router(), *moe.experts()]
