"""OPT and XGLM of Meta (arXiv:2205.01068, arXiv:2112.10668), and BioGPT of Microsoft (arXiv:2210.10341)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.dense import BiasedBridge, shared_fields
from megatron.bridge.models.fragments import HFNames

_LAYER_NAMES: dict[str, Any] = {
    "input_norm": "self_attn_layer_norm",
    "mlp_norm": "final_layer_norm",
    "attention_output": "self_attn.out_proj",
    "fc1": ("fc1",),
    "fc2": "fc2",
}


class OPTBridge(BiasedBridge):
    """`OPTForCausalLM`: learned positions, of which the first two rows are never used."""

    shared_fields = shared_fields(
        without=["num_query_groups", "layernorm_epsilon"],
        ffn_hidden_size="ffn_dim",
        init_method_std="init_std",
        hidden_dropout="dropout",
    )
    names = HFNames(
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        layer="model.decoder.layers.{l}",
        final_norm="model.decoder.final_layer_norm",
        **_LAYER_NAMES,
    )
    activation_field = "activation_function"

    def has_biases(self) -> bool:
        return bool(self.hf_config.enable_bias)

    def rope_fields(self) -> dict[str, Any]:
        return {"position_embedding_type": "learned_absolute"}

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        needed = {
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
            "word_embed_proj_dim": config.hidden_size,
        }
        other = {name: getattr(config, name) for name, value in needed.items() if getattr(config, name) != value}
        if other:
            raise BridgeError(f"config.json: {other} is not supported in OPTForCausalLM, which needs {needed}")
        return {"position_offset": 2, "layernorm_epsilon": 1e-5}


class BioGptBridge(OPTBridge):
    """`BioGptForCausalLM`: the same, with embeddings times the root of their size."""

    shared_fields = shared_fields(
        without=["num_query_groups", "layernorm_epsilon"],
        attention_dropout="attention_probs_dropout_prob",
        hidden_dropout="hidden_dropout_prob",
    )
    names = HFNames(
        embedding="biogpt.embed_tokens",
        positions="biogpt.embed_positions",
        layer="biogpt.layers.{l}",
        final_norm="biogpt.layer_norm",
        output="output_projection",
        **_LAYER_NAMES,
    )
    activation_field = "hidden_act"

    def has_biases(self) -> bool:
        return True

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        scale = config.hidden_size**0.5 if config.scale_embedding else 1.0
        # transformers builds these norms with PyTorch's epsilon, whatever `layer_norm_eps` says.
        return {"position_offset": 2, "layernorm_epsilon": 1e-5, "embedding_multiplier": scale}


class XGLMBridge(BioGptBridge):
    """`XGLMForCausalLM`: positions by fixed waves, of which the first two are never used."""

    shared_fields = shared_fields(
        without=["num_query_groups", "layernorm_epsilon"],
        ffn_hidden_size="ffn_dim",
        init_method_std="init_std",
        hidden_dropout="dropout",
    )
    names = HFNames(final_norm="model.layer_norm", **_LAYER_NAMES)
    activation_field = "activation_function"

    def rope_fields(self) -> dict[str, Any]:
        return {"position_embedding_type": "none", "sinusoidal_positions": "tensor2tensor"}

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        if config.add_cross_attention:
            raise BridgeError("config.json: add_cross_attention=True is not supported in XGLMForCausalLM")
        # transformers blanks the position of this number, which is none of those used where it is below the offset.
        if config.pad_token_id is not None and config.pad_token_id >= 2:
            raise BridgeError(
                f"config.json: pad_token_id={config.pad_token_id} would blank a position; it must be 0 or 1"
            )
        return super().differences()
