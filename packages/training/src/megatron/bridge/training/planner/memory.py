"""Bytes that a rank holds at its fullest moment, by kind."""

from dataclasses import dataclass

from megatron.bridge.training.planner.activations import Kept, Spec
from megatron.bridge.training.planner.layout import Layout
from megatron.bridge.training.planner.parameters import stage_layers, stage_parts
from megatron.bridge.training.planner.precision import Bytes
from megatron.bridge.training.planner.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights, gradients, optimizer: of the parameters.
        activations: what forward passes keep for backward passes, of all micro-batches under way.
        logits: at the end of the last stage.
        working: of the layer that is computed at the moment.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    working: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + max(self.logits, self.working)


def stage_memory(
    shape: ModelShape,
    layout: Layout,
    stage: int,
    *,
    replicas: int,
    micro_batches: int,
    size: Bytes,
    spec: Spec = "transformer_engine",
) -> Memory:
    """What a rank of a pipeline stage holds.

    Args:
        shape: the model, at the layout.
        layout: how it is divided.
        stage: of the pipeline.
        replicas: data-parallel ranks.
        micro_batches: of a step, on each replica.
        size: bytes per parameter.
        spec: whose modules compute it.
    """
    parts = stage_parts(shape, stage)
    dense = sum(part.count for part in parts if not part.is_expert)
    expert = sum(part.count for part in parts if part.is_expert)
    last = stage == layout.pipeline - 1
    kept = Kept(shape, size, spec)
    tokens = layout.micro_batch * shape.seq_length / layout.context
    return Memory(
        weights=size.weight * (dense + expert),
        gradients=size.gradient * (dense + expert),
        optimizer=_optimizer(dense, expert, layout, replicas, size),
        activations=tokens * _activations(kept, layout, stage, micro_batches),
        logits=tokens * kept.logits() if last else 0.0,
        working=tokens * _working(kept, layout, stage),
    )


def rank_memory(shape: ModelShape, layout: Layout, **run: object) -> Memory:
    """What the fullest rank holds; arguments as `stage_memory`'s."""
    stages = range(layout.pipeline) if len(set(shape.has_experts)) > 1 else sorted({0, layout.pipeline - 1})
    each = [stage_memory(shape, layout, stage, **run) for stage in stages]  # type: ignore[arg-type]
    return max(each, key=lambda memory: memory.total)


def _optimizer(dense: int, expert: int, layout: Layout, replicas: int, size: Bytes) -> float:
    if not size.distributed:
        return size.optimizer * float(dense + expert)
    # Context-parallel ranks hold the same weights. The experts' ranks are the same ranks, divided otherwise.
    sharers = replicas * layout.context
    expert_sharers = max(1, sharers * layout.tensor // (layout.expert * layout.expert_tensor))
    return size.optimizer * (dense / sharers + expert / expert_sharers)


def chunks_under_way(layout: Layout, stage: int, micro_batches: int) -> int:
    """Micro-batches, times virtual stages, whose activations a stage holds at its fullest (1F1B, arXiv:2104.04473)."""
    if layout.virtual == 1:
        return min(micro_batches, layout.pipeline - stage)
    most = (layout.pipeline - stage - 1) * 2 + (layout.virtual - 1) * layout.pipeline + 1
    return min(micro_batches * layout.virtual, most)


def _activations(kept: Kept, layout: Layout, stage: int, micro_batches: int) -> float:
    """Per token of a micro-batch."""
    kinds = stage_layers(kept.shape, stage)
    experts = sum(kinds)
    if layout.recompute == "full":
        layers = len(kinds) * kept.edge()
    else:
        layers = (len(kinds) - experts) * kept.layer(experts=False)
        layers += experts * kept.layer(experts=True) if experts else 0.0
    if stage == layout.pipeline - 1:
        predicted = kept.shape.mtp_num_layers or 0
        last = predicted * kept.layer(experts=kinds[-1]) if predicted else 0.0
        return layers * chunks_under_way(layout, stage, micro_batches) / layout.virtual + kept.output() + last
    return layers * chunks_under_way(layout, stage, micro_batches) / layout.virtual


def _working(kept: Kept, layout: Layout, stage: int) -> float:
    """Gradients of the widest tensors of a layer; and of a layer that is computed again, all that it keeps."""
    kinds = stage_layers(kept.shape, stage)
    largest = max(kept.layer(experts=kind) for kind in set(kinds))
    return largest if layout.recompute == "full" else 0.0
