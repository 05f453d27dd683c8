"""Bytes that a rank sends in a step, by what they are for."""

from dataclasses import dataclass

from megatron.bridge.training.planner.layout import Layout
from megatron.bridge.training.planner.parameters import stage_layers, stage_parts
from megatron.bridge.training.planner.precision import Bytes
from megatron.bridge.training.planner.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Bytes sent by a rank of the first stage in a step.

    Attributes:
        tensor: activations of each layer, gathered and reduced over tensor-parallel ranks.
        context: keys and values, passed around context-parallel ranks.
        expert: tokens, sent to their experts and back.
        pipeline: activations, handed to the next stage and their gradients back.
        data: gradients reduced and parameters gathered over replicas.
    """

    tensor: float
    context: float
    expert: float
    pipeline: float
    data: float


def communication(
    shape: ModelShape, layout: Layout, *, replicas: int, micro_batches: int, size: Bytes
) -> Communication:
    """What a rank of the first stage sends; arguments as `memory.stage_memory`'s."""
    kinds = stage_layers(shape, 0)
    tokens = layout.micro_batch * shape.seq_length / layout.context
    hidden = tokens * shape.hidden_size * size.activation
    passes = 3 if layout.recompute == "full" else 2
    # Each layer gathers and reduces what attention takes and gives, and what the MLP does.
    tensor = len(kinds) * passes * 4 * hidden * _ring(layout.tensor)
    keys = 2 * tokens * (shape.num_query_groups or 0) * (shape.kv_channels or 0) / layout.tensor * size.activation
    context = len(kinds) * 3 * keys * (layout.context - 1)
    sent = shape.moe_router_topk * hidden / layout.tensor
    expert = sum(kinds) * passes * 2 * sent * _ring(layout.expert)
    crossing = 2 * layout.virtual * hidden / layout.tensor if layout.pipeline > 1 else 0.0
    weights = sum(part.count for part in stage_parts(shape, 0))
    data = weights * (size.gradient + size.gathered) * _ring(replicas * layout.context)
    return Communication(
        tensor=micro_batches * tensor,
        context=micro_batches * context,
        expert=micro_batches * expert,
        pipeline=micro_batches * crossing,
        data=data,
    )


def _ring(ranks: int) -> float:
    """The share of a tensor that each rank sends when all gather it, or reduce and scatter it."""
    return (ranks - 1) / ranks
