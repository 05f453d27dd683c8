"""Granite 3 and later of IBM (2024), and HyperCLOVA X of NAVER, which changes it."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.models.families.llama import LlamaBridge
from megatron.bridge.models.fragments import HFNames


class GraniteBridge(LlamaBridge):
    """`GraniteForCausalLM`: Llama with factors on embeddings, residuals, scores and logits."""

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        return {
            "embedding_multiplier": config.embedding_multiplier,
            "residual_multiplier": config.residual_multiplier,
            "softmax_scale": config.attention_multiplier,
            "logits_multiplier": 1 / config.logits_scaling,
        }


class GraniteSWABridge(GraniteBridge):
    """`GraniteSWAForCausalLM`: windows, attention sinks, and a rotary base (0 for no rotation) per layer."""

    def differences(self) -> Mapping[str, Any]:
        still = [int(not theta) for theta in self.hf_config.layer_rope_theta]
        return {**super().differences(), "softmax_type": "learnable", "no_rope_freq": still}

    def rope_fields(self) -> dict[str, Any]:
        rope, bases = self.hf_config.rope_parameters, self.hf_config.layer_rope_theta
        return {"layer_rope_parameters": [{**rope, "rope_theta": theta or rope["rope_theta"]} for theta in bases]}


class HyperCLOVAXBridge(GraniteBridge):
    """`HyperCLOVAXForCausalLM`: Granite with norms behind attention and MLP, and logits that are multiplied."""

    names = HFNames(attention_post_norm="post_norm1", mlp_post_norm="post_norm2")

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        return {
            **super().differences(),
            "logits_multiplier": config.logits_scaling,
            "post_norm": bool(config.use_post_norm),
        }
