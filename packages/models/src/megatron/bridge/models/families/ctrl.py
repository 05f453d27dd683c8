"""CTRL of Salesforce (arXiv:1909.05858)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.activations import activation
from megatron.bridge.models.families.dense import BiasedBridge, shared_fields
from megatron.bridge.models.fragments import HFNames

# What transformers builds the layers' norms with, whatever the configuration says of the last one.
_EPSILON = 1e-6


class CTRLBridge(BiasedBridge):
    """`CTRLLMHeadModel`: positions by fixed waves, biases everywhere, in the output layer too."""

    shared_fields = shared_fields(
        without=["num_query_groups", "attention_dropout"],
        ffn_hidden_size="dff",
        layernorm_epsilon="layer_norm_epsilon",
        hidden_dropout="resid_pdrop",
    )
    names = HFNames(
        embedding="transformer.w",
        layer="transformer.h.{l}",
        final_norm="transformer.layernorm",
        input_norm="layernorm1",
        mlp_norm="layernorm2",
        qkv=tuple(f"multi_head_attention.{name}" for name in ("Wq", "Wk", "Wv")),
        attention_output="multi_head_attention.dense",
        fc1=("ffn.0",),
        fc2="ffn.2",
    )

    def activation_function(self) -> Any:
        return activation("relu")

    def rope_fields(self) -> dict[str, Any]:
        return {"position_embedding_type": "none", "sinusoidal_positions": "transformer"}

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        if config.layer_norm_epsilon != _EPSILON:
            raise BridgeError(
                f"config.json: layer_norm_epsilon={config.layer_norm_epsilon} for the last norm, and transformers has "
                f"{_EPSILON} for all others; Megatron-Core has one"
            )
        return {"embedding_multiplier": config.hidden_size**0.5, "output_bias": True}
