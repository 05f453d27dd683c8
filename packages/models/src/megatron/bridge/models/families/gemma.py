"""Gemma, Gemma 2, Gemma 3 (text) and VaultGemma of Google (arXiv:2403.08295, arXiv:2408.00118, arXiv:2503.19786)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.dense import DenseBridge
from megatron.bridge.models.families.layer_ropes import rope_fields_by_layer_type
from megatron.bridge.models.fragments import HFNames


class GemmaBridge(DenseBridge):
    """`GemmaForCausalLM`: norms by 1 + weight, and embeddings times the root of their size."""

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    output_bias = qkv_bias

    def differences(self) -> Mapping[str, Any]:
        if getattr(self.hf_config, "use_bidirectional_attention", None):
            raise BridgeError("config.json: use_bidirectional_attention makes this an encoder, not a causal model")
        return {"layernorm_zero_centered_gamma": True, "embedding_multiplier": self.hf_config.hidden_size**0.5}


class VaultGemmaBridge(GemmaBridge):
    """`VaultGemmaForCausalLM`: windows on some layers, capped scores and logits, a scale of its own for the scores."""

    names = HFNames(mlp_norm="pre_feedforward_layernorm")
    activation_field = "hidden_activation"

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        return {
            **super().differences(),
            "softmax_scale": config.query_pre_attn_scalar**-0.5,
            "attention_softcap": config.attn_logit_softcapping,
            "logits_softcap": config.final_logit_softcapping,
        }


class Gemma2Bridge(VaultGemmaBridge):
    """`Gemma2ForCausalLM`: norms before and behind attention and MLP."""

    def differences(self) -> Mapping[str, Any]:
        return {**super().differences(), "post_norm": True}


class Gemma3Bridge(Gemma2Bridge):
    """`Gemma3ForCausalLM`: norms on queries and keys; windowed layers turn faster than the others."""

    def qk_norm(self) -> bool:
        return True

    def rope_fields(self) -> dict[str, Any]:
        return rope_fields_by_layer_type(self.hf_config)
