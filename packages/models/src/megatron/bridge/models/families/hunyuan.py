"""Hunyuan dense models of Tencent (2025)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.conversion import hf_config
from megatron.bridge.models.families.dense import DenseBridge
from megatron.bridge.models.fragments import HFNames


class HunYuanDenseV1Bridge(DenseBridge):
    """`HunYuanDenseV1ForCausalLM`: the norms on queries and keys follow the rotation."""

    names = HFNames(q_norm="self_attn.query_layernorm", k_norm="self_attn.key_layernorm")

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    output_bias = qkv_bias

    def qk_norm(self) -> bool:
        return True

    def differences(self) -> Mapping[str, Any]:
        return {"qk_norm_after_rope": True}

    def rope_fields(self) -> dict[str, Any]:
        """A scaling with a fixed `alpha`, which is called dynamic, is no more than another base."""
        rope, alpha = self.hf_config.rope_parameters, self.hf_config.rope_parameters.get("alpha")
        if rope["rope_type"] != "dynamic" or not alpha:
            return super().rope_fields()
        size = hf_config.head_dim(self.hf_config)
        return {"rotary_base": rope["rope_theta"] * alpha ** (size / (size - 2))}
