"""OLMo, OLMo 2 and OLMo 3 of Ai2 (arXiv:2402.00838, arXiv:2501.00656, 2025)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.dense import DenseBridge, shared_fields
from megatron.bridge.models.families.layer_ropes import rope_fields_by_layer_type


def refuse_clipping(limit: float | None) -> None:
    """Refuse a model whose queries, keys and values are clipped.

    Raises:
        BridgeError: there is a limit.
    """
    if limit is not None:
        raise BridgeError(
            f"config.json: clip_qkv={limit} has no counterpart on Megatron-Core, and without it the model computes "
            "something else"
        )


class OlmoBridge(DenseBridge):
    """`OlmoForCausalLM`: LayerNorms without parameters."""

    shared_fields = shared_fields(without=["layernorm_epsilon"])
    normalization = "LayerNorm"
    norm_kinds = ()

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    output_bias = qkv_bias

    def differences(self) -> Mapping[str, Any]:
        refuse_clipping(self.hf_config.clip_qkv)
        return {"layernorm_epsilon": 1e-5}


class Olmo2Bridge(DenseBridge):
    """`Olmo2ForCausalLM`: norms behind attention and MLP only, and over all queries and all keys of a token."""

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    output_bias = qkv_bias

    def qk_norm(self) -> bool:
        return True

    def differences(self) -> Mapping[str, Any]:
        return {"pre_norm": False, "post_norm": True, "qk_norm_over": "projection"}


class Olmo3Bridge(Olmo2Bridge):
    """`Olmo3ForCausalLM`: OLMo 2 with windows and with rotary settings by kind of layer."""

    def rope_fields(self) -> dict[str, Any]:
        return rope_fields_by_layer_type(self.hf_config)
