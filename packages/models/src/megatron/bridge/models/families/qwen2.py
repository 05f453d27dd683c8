"""Qwen2 and Qwen2.5 (arXiv:2407.10671, arXiv:2412.15115)."""

from megatron.bridge.models.families.dense import DenseBridge


class Qwen2Bridge(DenseBridge):
    """`Qwen2ForCausalLM`: biases on q, k and v only; some layers may have an attention window."""

    def qkv_bias(self) -> bool:
        return True
