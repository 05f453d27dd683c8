"""Llama 3.2 1B. Model values: the `config.json` of meta-llama/Llama-3.2-1B."""

from typing import TYPE_CHECKING, Any

from megatron.bridge.recipes.pretraining import pretraining

if TYPE_CHECKING:
    from megatron.bridge.models import GPTModelProvider
    from megatron.bridge.training.config import ConfigContainer


def model(seq_length: int = 8192) -> "GPTModelProvider":
    """The model's definition, in bf16; no weights, nothing is downloaded."""
    import torch

    from megatron.bridge.models import GPTModelProvider

    return GPTModelProvider(
        num_layers=16,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=64,
        vocab_size=128256,
        seq_length=seq_length,
        max_position_embeddings=131072,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        share_embeddings_and_output_weights=True,
        rotary_base=500000.0,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        params_dtype=torch.bfloat16,
        bf16=True,
    )


def pretrain_config(seq_length: int = 8192, **settings: Any) -> "ConfigContainer":
    """Pretraining of Llama 3.2 1B, on mock data until `data_paths` or `cfg.dataset` says otherwise.

    Args:
        seq_length: tokens per sequence.
        settings: see `megatron.bridge.recipes.pretraining.pretraining`.
    """
    return pretraining(model(seq_length), **settings)
