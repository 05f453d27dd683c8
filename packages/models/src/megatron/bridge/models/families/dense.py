"""Decoders of the Llama layout: what their configurations mean to Megatron, and the table they share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from megatron.bridge.conversion import hf_config
from megatron.bridge.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.conversion.table import WeightTable
from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.models import fragments

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from megatron.bridge.models.gpt_provider import GPTModelProvider

_GATED_ACTIVATIONS = {"silu": torch.nn.functional.silu, "swish": torch.nn.functional.silu}

# Megatron field <- Hugging Face field, the same value on both sides; read in both directions.
SHARED_FIELDS: dict[str, str] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "layernorm_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
    "init_method_std": "initializer_range",
    "attention_dropout": "attention_dropout",
}


class DenseBridge(MegatronModelBridge):
    """RMSNorm before attention and a gated MLP; subclasses say where their family differs."""

    shared_fields = SHARED_FIELDS

    def qkv_bias(self) -> bool:
        return False

    def output_bias(self) -> bool:
        return False

    def mlp_bias(self) -> bool:
        return False

    def qk_norm(self) -> bool:
        return False

    def windows(self) -> Sequence[int | None]:
        """Per layer, how many positions attention sees (its own included), or None for all."""
        return [None] * self.hf_config.num_hidden_layers

    def provider_bridge(self) -> "GPTModelProvider":
        from megatron.bridge.models.gpt_provider import GPTModelProvider

        config = self.hf_config
        rope = hf_config.rope(config)
        return GPTModelProvider(
            **self.shared_values(),
            **window_fields(self.windows()),
            kv_channels=hf_config.head_dim(config),
            seq_length=config.max_position_embeddings,
            normalization="RMSNorm",
            activation_func=gated_activation(config),
            gated_linear_unit=True,
            hidden_dropout=0.0,
            add_bias_linear=False,
            add_qkv_bias=self.qkv_bias(),
            add_attention_output_bias=self.output_bias(),
            add_mlp_bias=self.mlp_bias(),
            qk_layernorm=self.qk_norm(),
            rotary_base=rope.theta,
            rotary_percent=rope.percent,
            rope_parameters=dict(rope.scaling) if rope.scaling else None,
        )

    def mapping_registry(self) -> WeightTable:
        config = self.hf_config
        tied = bool(config.tie_word_embeddings)
        return WeightTable.of(
            fragments.embedding(config.vocab_size),
            fragments.pre_norms(),
            fragments.attention(
                heads=config.num_attention_heads,
                groups=config.num_key_value_heads,
                head_dim=hf_config.head_dim(config),
                qkv_bias=self.qkv_bias(),
                output_bias=self.output_bias(),
                qk_norm=self.qk_norm(),
            ),
            fragments.gated_mlp(bias=self.mlp_bias()),
            fragments.head(config.vocab_size, tied=tied),
            tied=fragments.tied_head(tied=tied),
            # Frequencies that checkpoints made before transformers 4.32 stored; they follow from the configuration.
            ignored=("model.layers.{l}.self_attn.rotary_emb.inv_freq",),
        )


def gated_activation(config: "PretrainedConfig") -> Any:
    """The activation on the gate.

    Raises:
        BridgeError: no Megatron counterpart is known for `hidden_act`.
    """
    if config.hidden_act not in _GATED_ACTIVATIONS:
        raise BridgeError(
            f"config.json: hidden_act {config.hidden_act!r} is not supported in this family"
            f"{did_you_mean(config.hidden_act, _GATED_ACTIVATIONS)} (known: {', '.join(_GATED_ACTIVATIONS)})"
        )
    return _GATED_ACTIVATIONS[config.hidden_act]


def window_fields(windows: Sequence[int | None]) -> dict[str, Any]:
    """Megatron's fields for sliding-window attention.

    Megatron counts the positions to the left of the current one; Hugging Face counts the current one too.

    Raises:
        BridgeError: two layers have windows of different sizes.
    """
    sizes = {window for window in windows if window is not None}
    if not sizes:
        return {}
    if len(sizes) > 1:
        raise BridgeError(f"layers have attention windows of different sizes ({sorted(sizes)}); Megatron-Core has one")
    fields: dict[str, Any] = {"window_size": (sizes.pop() - 1, 0)}
    if None in windows:
        fields["window_attn_skip_freq"] = [int(window is not None) for window in windows]
    return fields
