"""Phi-3.5-MoE and GRIN of Microsoft (arXiv:2404.14219, arXiv:2409.12136)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.mixtral import MixtralBridge
from megatron.bridge.models.fragments import WEIGHT_AND_BIAS
from megatron.bridge.models.routing import balancing, sparsemixer_routing


class PhimoeBridge(MixtralBridge):
    """`PhimoeForCausalLM`: Mixtral with LayerNorms, biases and SparseMixer."""

    normalization = "LayerNorm"
    norm_kinds = WEIGHT_AND_BIAS

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    output_bias = qkv_bias

    def differences(self) -> Mapping[str, Any]:
        return {"output_bias": bool(self.hf_config.lm_head_bias)}

    def rope_fields(self) -> dict[str, Any]:
        """LongRoPE as transformers computes it here: the short factors at any length, and a scale of its own."""
        fields, rope = super().rope_fields(), self.hf_config.rope_parameters
        if fields["rope_parameters"] is None:
            return fields
        scales = {rope["short_mscale"], rope["long_mscale"]}
        if rope["rope_type"] != "longrope" or len(scales) > 1:
            raise BridgeError(
                f"config.json: rope_parameters are expressed for longrope with one mscale only, not {rope}"
            )
        scaled = {**rope, "long_factor": rope["short_factor"], "attention_factor": scales.pop()}
        return {**fields, "rope_parameters": scaled}

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        if config.input_jitter_noise:
            raise BridgeError(
                f"config.json: input_jitter_noise={config.input_jitter_noise} changes what experts read in training, "
                "and Megatron-Core jitters what the router reads; set it to 0"
            )
        return {
            **sparsemixer_routing(config.num_experts_per_tok, jitter=config.router_jitter_noise),
            **balancing(config.router_aux_loss_coef),
        }
