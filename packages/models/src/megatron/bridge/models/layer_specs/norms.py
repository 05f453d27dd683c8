"""The norms of the `torch` layer spec: PyTorch's own, marked for Megatron's sequence parallelism."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

NORMS: dict[str, type[torch.nn.Module]] = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


def torch_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
    """The norm that `config.normalization` names, over a last axis of `hidden_size`.

    Under sequence parallelism every rank sees some of the tokens only, so that the gradients of a norm's weights are
    partial sums; Megatron-Core adds up those of parameters that carry `sequence_parallel = True`.
    """
    norm = NORMS[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm
