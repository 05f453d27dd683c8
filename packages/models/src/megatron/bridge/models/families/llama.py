"""Llama 1, 2, 3, 3.1, 3.2 and 3.3 (arXiv:2302.13971, arXiv:2307.09288, arXiv:2407.21783)."""

from megatron.bridge.models.families.dense import DenseBridge


class LlamaBridge(DenseBridge):
    """`LlamaForCausalLM`; `InternLM3ForCausalLM` and `IQuestCoderForCausalLM` are Llama to transformers too."""

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    def output_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    def mlp_bias(self) -> bool:
        return bool(self.hf_config.mlp_bias)


class CwmBridge(LlamaBridge):
    """`CwmForCausalLM` (Code World Model, arXiv:2510.02387): `layer_types` say which layers have a window."""

    def qkv_bias(self) -> bool:
        return False

    output_bias = qkv_bias
