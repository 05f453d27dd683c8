"""What surrounds a model for training: device, mixed-precision module, Megatron-Core's DDP."""

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge import platform


def prepared_chunks(chunks: list[torch.nn.Module], config: TransformerConfig) -> list[torch.nn.Module]:
    """The chunks on this process's device, in `Float16Module` when the model computes in bf16 or fp16."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        chunk.to(platform.device())
    if not (config.bf16 or config.fp16):
        return chunks
    kept = [(module, module.expert_bias) for chunk in chunks for module in chunk.modules() if _has_routing_bias(module)]
    wrapped: list[torch.nn.Module] = [Float16Module(config, chunk) for chunk in chunks]
    for module, bias in kept:
        # Megatron-Core goes back to fp32 at the first step, when the bits that choose experts are lost already.
        module.expert_bias = bias
    return wrapped


def _has_routing_bias(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "expert_bias", None), torch.Tensor)


def with_ddp(
    chunks: list[torch.nn.Module], config: TransformerConfig, ddp_config: DistributedDataParallelConfig | None
) -> list[torch.nn.Module]:
    """The chunks in Megatron-Core's DDP, starting from rank 0's weights in every data-parallel group."""
    settings = ddp_config or DistributedDataParallelConfig()
    wrapped: list[torch.nn.Module] = [
        # Later chunks finish their gradients first, so only the first one's buckets are worth overlapping.
        DistributedDataParallel(config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()  # type: ignore[operator]
    return wrapped
