"""Layouts that can run: those that validation and Megatron-Core's own rules let pass."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layout_checks import layout_problems
from megatron.bridge.models.model_provider import refuse_misfit
from megatron.bridge.training.config import TrainingConfig
from megatron.bridge.training.planner.hardware import Cluster
from megatron.bridge.training.planner.layout import Layout
from megatron.bridge.training.planner.shape import ModelShape
from megatron.bridge.training.problems.layout import parallel_problems

# The fewest tokens of a sequence that are worth a context-parallel rank of their own: ours.
_FEWEST_TOKENS = 2048


def problems(shape: ModelShape, layout: Layout, world: int, global_batch: int) -> list[str]:
    """Why a layout cannot run, in the words of those who would refuse it."""
    divided = layout.at(shape)
    if found := layout_problems(divided):  # type: ignore[arg-type]
        return found
    try:
        refuse_misfit(layout.sizes(), world)
    except BridgeError as error:
        return [str(error)]
    train = TrainingConfig(train_iters=1, global_batch_size=global_batch, micro_batch_size=layout.micro_batch)
    return list(parallel_problems(SimpleNamespace(model=divided, train=train), world))  # type: ignore[arg-type]


def candidates(shape: ModelShape, cluster: Cluster, global_batch: int) -> Iterator[Layout]:
    """Every layout of these ranks that can run, without recomputation; memory is not asked about."""
    for tensor in _powers(min(cluster.device.node, shape.num_query_groups or 1)):
        for context in _powers(1 if shape.multi_latent_attention else max(1, shape.seq_length // _FEWEST_TOKENS)):
            for pipeline in _divisors(shape.num_layers):
                if cluster.count % (tensor * context * pipeline) == 0:
                    for expert in _powers(shape.num_moe_experts or 1):
                        yield from _with_batches(shape, cluster, global_batch, tensor, context, pipeline, expert)


def _with_batches(
    shape: ModelShape, cluster: Cluster, global_batch: int, tensor: int, context: int, pipeline: int, expert: int
) -> Iterator[Layout]:
    depth = shape.num_layers // pipeline
    sizes: dict[str, Any] = {"tensor": tensor, "context": context, "pipeline": pipeline, "expert": expert}
    if problems(shape, Layout(**sizes), cluster.count, global_batch):
        return
    for virtual in {1, *(depth // each for each in (1, 2, 4) if pipeline > 1 and depth % each == 0)}:
        for micro_batch in (1, 2, 4):
            layout = Layout(**sizes, virtual=virtual, micro_batch=micro_batch)
            at_once = cluster.count // layout.ranks * micro_batch
            # Stages of an interleaved pipeline take turns in rounds of as many micro-batches as there are stages.
            if global_batch % (at_once * (pipeline if virtual > 1 else 1)) == 0:
                yield layout


def _powers(most: int) -> list[int]:
    return [1 << power for power in range(max(1, most).bit_length())]


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, min(number, 64) + 1) if number % each == 0]
