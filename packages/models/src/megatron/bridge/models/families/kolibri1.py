"""Kolibri of Aleph Alpha (2026)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.exaone4 import Exaone4Bridge
from megatron.bridge.models.families.moe import MoEBridge
from megatron.bridge.models.fragments import HFNames
from megatron.bridge.models.routing import balancing, sigmoid_of_chosen


class Kolibri1Bridge(MoEBridge, Exaone4Bridge):
    """`Kolibri1ForCausalLM`: EXAONE 4's attention, norms before and behind, and sigmoid routing with a bias."""

    shared_fields: ClassVar[dict[str, str]] = {
        field: name for field, name in MoEBridge.shared_fields.items() if field != "ffn_hidden_size"
    }
    names = HFNames(attention_post_norm="post_attn_norm")

    def differences(self) -> Mapping[str, Any]:
        return {**super().differences(), "pre_norm": True}

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        return {
            **sigmoid_of_chosen(config.num_experts_per_tok, normalised=config.norm_topk_prob, bias=True),
            # The bias is what balances the experts.
            **balancing(None),
            "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        }

    def moe_rules(self) -> list[WeightRule]:
        norms = [*moe.moe_norm(), *moe.moe_post_norm("model.layers.{l}.post_ffn_norm")]
        router = moe.router(selection_bias="model.layers.{l}.moe.router.expert_bias")
        return [*norms, *router, *moe.shared_experts(), *moe.experts()]
