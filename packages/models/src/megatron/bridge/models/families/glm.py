"""GLM-4 dense models of Zhipu AI (arXiv:2406.12793)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.models.families.dense import DenseBridge
from megatron.bridge.models.fragments import HFNames


class GlmBridge(DenseBridge):
    """`GlmForCausalLM`: half of each head turns, neighbouring channels together; gate and up projection in one."""

    names = HFNames(fc1=("mlp.gate_up_proj",))

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    def differences(self) -> Mapping[str, Any]:
        return {"rotary_interleaved": True}


class Glm4Bridge(GlmBridge):
    """`Glm4ForCausalLM`: norms behind attention and MLP besides."""

    names = HFNames(
        fc1=("mlp.gate_up_proj",), attention_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm"
    )

    def differences(self) -> Mapping[str, Any]:
        return {**super().differences(), "post_norm": True}
