"""Falcon 7B, 40B, 180B and 11B of TII (arXiv:2311.16867)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.dense import BiasedBridge, shared_fields
from megatron.bridge.models.fragments import HFNames

_NAMES: dict[str, Any] = {
    "embedding": "transformer.word_embeddings",
    "layer": "transformer.h.{l}",
    "final_norm": "transformer.ln_f",
    "qkv": ("self_attention.query_key_value",),
    "grouped_qkv": True,
    "attention_output": "self_attention.dense",
    "fc1": ("mlp.dense_h_to_4h",),
    "fc2": "mlp.dense_4h_to_h",
}


class FalconBridge(BiasedBridge):
    """`FalconForCausalLM`: attention and MLP side by side, with one LayerNorm or two; q, k and v by group."""

    shared_fields = shared_fields(
        without=["num_query_groups"],
        ffn_hidden_size="ffn_hidden_size",
        layernorm_epsilon="layer_norm_epsilon",
        hidden_dropout="hidden_dropout",
    )
    activation_field = "activation"

    @property
    def names(self) -> HFNames:  # type: ignore[override]
        if self._two_norms_in_parallel():
            return HFNames(**_NAMES, input_norm="ln_attn", mlp_norm="ln_mlp")
        return HFNames(**_NAMES)

    def _two_norms_in_parallel(self) -> bool:
        config = self.hf_config
        return bool(config.new_decoder_architecture and config.num_ln_in_parallel_attn != 1)

    def has_biases(self) -> bool:
        return bool(self.hf_config.bias)

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        if config.alibi:
            raise BridgeError("config.json: alibi=True is not supported in FalconForCausalLM (Falcon-RW)")
        groups = config.num_attention_heads
        if config.new_decoder_architecture:
            groups = config.num_kv_heads
        elif config.multi_query:
            groups = 1
        parallel = bool(config.new_decoder_architecture or config.parallel_attn)
        return {
            "num_query_groups": groups,
            "parallel_block": parallel,
            "shared_pre_norm": parallel and not self._two_norms_in_parallel(),
        }
