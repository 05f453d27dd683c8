"""Command R, Aya and Command R7B of Cohere (2024, arXiv:2412.04261)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.models.families.dense import DenseBridge, shared_fields


class CohereBridge(DenseBridge):
    """`CohereForCausalLM`: attention and MLP read the same LayerNorm, which has no bias."""

    shared_fields = shared_fields(layernorm_epsilon="layer_norm_eps")
    normalization = "LayerNorm"

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    output_bias = qkv_bias

    def qk_norm(self) -> bool:
        return bool(self.hf_config.use_qk_norm)

    def differences(self) -> Mapping[str, Any]:
        return {
            "rotary_interleaved": True,
            "parallel_block": True,
            "shared_pre_norm": True,
            "qk_norm_over": "heads",
            "logits_multiplier": self.hf_config.logit_scale,
        }


class Cohere2Bridge(CohereBridge):
    """`Cohere2ForCausalLM`: layers with a window turn queries and keys, the others do not."""

    def qk_norm(self) -> bool:
        return False

    def differences(self) -> Mapping[str, Any]:
        unturned = [int(kind != "sliding_attention") for kind in self.hf_config.layer_types]
        return {**super().differences(), "no_rope_freq": unturned}
