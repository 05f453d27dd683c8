"""Small projections that every tensor-parallel rank holds whole."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


def replicated_linear(config: TransformerConfig, inputs: int, outputs: int) -> nn.Linear:
    """A projection without bias. Under sequence parallelism Megatron-Core adds up its ranks' gradients.

    Args:
        config: of the model.
        inputs, outputs: channels.
    """
    linear = nn.Linear(inputs, outputs, bias=False, dtype=config.params_dtype)
    if config.perform_initialization and config.init_method is not None:
        with torch.no_grad():
            config.init_method(linear.weight)
    linear.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return linear
