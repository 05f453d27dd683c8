"""Qwen2 and Qwen2.5 (arXiv:2407.10671, arXiv:2412.15115)."""

from collections.abc import Sequence

from megatron.bridge.models.families.dense import DenseBridge


class Qwen2Bridge(DenseBridge):
    """`Qwen2ForCausalLM`: biases on q, k and v only; some layers may have an attention window."""

    def qkv_bias(self) -> bool:
        return True

    def windows(self) -> Sequence[int | None]:
        config = self.hf_config
        return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
