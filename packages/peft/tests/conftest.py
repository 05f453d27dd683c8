"""Megatron-Core is imported once, ranks are forked from this process; a tiny GPT model with biases everywhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.bridge.testing import import_engine

VOCABULARY, SEQUENCE = 64, 8


@pytest.fixture(scope="session", autouse=True)
def _engine() -> None:
    import_engine()
    # Forked ranks must not inherit a pool of OpenMP threads.
    torch.set_num_threads(1)


def biased_gpt(**changes: Any) -> torch.nn.Module:
    """Stock Megatron-Core GPT on its local spec: 2 layers, hidden 16, LayerNorm, and random biases."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    tensor, pipeline = changes.get("tensor_model_parallel_size", 1), changes.get("pipeline_model_parallel_size", 1)
    parallel_state.initialize_model_parallel(tensor, pipeline)
    model_parallel_cuda_manual_seed(7)
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_hidden_size": 32,
        "num_attention_heads": 4,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "pipeline_dtype": torch.float32,
        "add_bias_linear": True,
    }
    model = GPTModel(
        config=TransformerConfig(**(values | changes)),
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="LayerNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.fixture(scope="session")
def make_gpt() -> Callable[..., torch.nn.Module]:
    return biased_gpt


@pytest.fixture(scope="session")
def gpt_batch() -> dict[str, torch.Tensor]:
    """Two sequences, their positions and next tokens, and the causal mask."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=generator)
    return {
        "input_ids": tokens[:, :-1],
        "position_ids": torch.arange(SEQUENCE).expand(2, -1),
        "attention_mask": torch.ones(1, 1, SEQUENCE, SEQUENCE).tril() < 0.5,
        "labels": tokens[:, 1:],
    }
