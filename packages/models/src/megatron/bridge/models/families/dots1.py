"""dots.llm1 (arXiv:2506.05767)."""

from collections.abc import Sequence

from megatron.bridge.models.families.moe import after_dense_prefix
from megatron.bridge.models.families.sigmoid_moe import SigmoidMoEBridge


class Dots1Bridge(SigmoidMoEBridge):
    """`Dots1ForCausalLM`: a dense prefix, and a norm on every query and key."""

    def output_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    def qk_norm(self) -> bool:
        return True

    def windows(self) -> Sequence[int | None]:
        config = self.hf_config
        return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]

    def moe_layers(self) -> Sequence[bool]:
        return after_dense_prefix(self)
