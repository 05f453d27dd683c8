"""Seed-OSS of ByteDance (2025)."""

from megatron.bridge.models.families.llama import LlamaBridge


class SeedOssBridge(LlamaBridge):
    """`SeedOssForCausalLM`: Llama with a switch of its own for the bias of attention's output."""

    def output_bias(self) -> bool:
        return bool(self.hf_config.attention_out_bias)
