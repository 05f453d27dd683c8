"""ERNIE 4.5 mixtures of experts of Baidu (2025)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.errors import BridgeError
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.dense import shared_fields
from megatron.bridge.models.families.moe import MoEBridge
from megatron.bridge.models.routing import balancing, biased_softmax_routing


class Ernie45MoeBridge(MoEBridge):
    """`Ernie4_5_MoeForCausalLM`: softmax scores with a bias for the choice; neighbouring channels turn together.

    Layers for multi-token prediction have no rules: a checkpoint that holds them is refused, naming them.
    """

    shared_fields: ClassVar[dict[str, str]] = shared_fields(
        without=["attention_dropout"], moe_ffn_hidden_size="moe_intermediate_size", num_moe_experts="moe_num_experts"
    )

    def differences(self) -> Mapping[str, Any]:
        if self.hf_config.use_bias:
            raise BridgeError("config.json: use_bias=True, and Megatron-Core's shared experts have no biases")
        return {"rotary_interleaved": True, "router_fp32": True}

    def moe_layers(self) -> Sequence[bool]:
        config = self.hf_config
        first, last, step = config.moe_layer_start_index, config.moe_layer_end_index, config.moe_layer_interval
        return [first <= layer <= last and (layer + 1) % step == 0 for layer in range(config.num_hidden_layers)]

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        return {
            **biased_softmax_routing(config.moe_k, least_sum=config.moe_norm_min),
            **balancing(config.router_aux_loss_coef),
            "moe_shared_expert_intermediate_size": config.moe_intermediate_size * config.moe_num_shared_experts or None,
        }

    def moe_rules(self) -> list[WeightRule]:
        shared = moe.shared_experts() if self.hf_config.moe_num_shared_experts else []
        # The bias has a leading axis of one, of which this is the only entry.
        bias = "model.layers.{l}.mlp.moe_statics.e_score_correction_bias[0]"
        return [*moe.moe_norm(), *moe.router(selection_bias=bias, keeps_dtype=True), *shared, *moe.experts()]
