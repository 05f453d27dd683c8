"""Qwen3 dense models (arXiv:2505.09388)."""

from megatron.bridge.models.families.qwen2 import Qwen2Bridge


class Qwen3Bridge(Qwen2Bridge):
    """`Qwen3ForCausalLM`: Qwen2's layout with a norm on every query and key in place of the biases."""

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    def output_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    def qk_norm(self) -> bool:
        return True
