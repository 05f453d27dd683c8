"""An export as data: what becomes of each Megatron weight, how many bytes, who holds it, and what goes together."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from megatron.bridge.conversion.entries import base_name
from megatron.bridge.conversion.plan import PlanItem
from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.conversion.transforms import Shape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ConversionTask:
    """One Megatron weight of an export.

    Args:
        item: the weight and the Hugging Face weights it becomes.
        held: dtype in the model.
        dtypes: of the Hugging Face weights, following `hf`.
        pipeline_ranks: stages that hold it, in the pipeline-parallel group; several for a tied weight.
        expert_rank: who holds it in the expert-parallel group; None for a weight that all of them hold.
        parts: tensor-parallel (for experts: expert-tensor-parallel) ranks that hold one part each; 1 when each of
            them holds the whole.
    """

    item: PlanItem
    held: "torch.dtype"
    dtypes: "tuple[torch.dtype, ...]"
    pipeline_ranks: tuple[int, ...]
    expert_rank: int | None
    parts: int

    @property
    def megatron(self) -> str:
        """Canonical Megatron name."""
        return self.item.megatron

    @property
    def shape(self) -> Shape:
        """Global shape of the Megatron weight."""
        return self.item.shape

    @property
    def hf(self) -> tuple[str, ...]:
        """Hugging Face names; `NAME[e]` is entry e of a stacked weight."""
        return self.item.hf

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        """Shapes that follow `hf`."""
        return self.item.hf_shapes

    @property
    def rule(self) -> WeightRule:
        """The table's rule that joins the two sides."""
        return self.item.rule

    @property
    def nbytes(self) -> int:
        """Bytes of its Hugging Face weights."""
        sizes = zip(self.hf_shapes, self.dtypes, strict=True)
        return sum(prod(shape) * dtype.itemsize for shape, dtype in sizes)

    @property
    def exchanged_bytes(self) -> int:
        """Bytes of the whole weight as the model holds it."""
        return self.item.numel * self.held.itemsize


@dataclass(frozen=True)
class TaskBucket:
    """Tasks whose Hugging Face weights are handed out together."""

    tasks: tuple[ConversionTask, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its Hugging Face weights."""
        return sum(task.nbytes for task in self.tasks)

    def __iter__(self) -> Iterator[ConversionTask]:
        return iter(self.tasks)


def groups(tasks: Iterable[ConversionTask]) -> list[list[ConversionTask]]:
    """Tasks that no bucket may part: those of one stacked weight's entries. Any other task is a group by itself."""
    by_stacked: dict[str, list[ConversionTask]] = {}
    found: list[list[ConversionTask]] = []
    for task in tasks:
        stacked = [base_name(name) for name in task.hf if base_name(name) != name]
        group = next((by_stacked[name] for name in stacked if name in by_stacked), None)
        if group is None:
            group = []
            found.append(group)
        group.append(task)
        by_stacked |= dict.fromkeys(stacked, group)
    return found


def in_buckets(tasks: Iterable[ConversionTask], bucket_bytes: int) -> list[TaskBucket]:
    """Buckets of at most `bucket_bytes`, in order; a group that is larger has a bucket of its own."""
    buckets: list[list[ConversionTask]] = []
    room = 0
    for group in groups(tasks):
        size = sum(task.nbytes for task in group)
        if not buckets or size > room:
            buckets.append([])
            room = bucket_bytes
        buckets[-1] += group
        room -= size
    return [TaskBucket(tuple(bucket)) for bucket in buckets]


def in_batches(tasks: Sequence[ConversionTask], limit: int) -> list[list[ConversionTask]]:
    """Neighbours that the same ranks hold, at most `limit` bytes together; a task that is larger stands alone."""
    batches: list[list[ConversionTask]] = []
    source, room = None, 0
    for task in tasks:
        holder, size = (task.pipeline_ranks[0], task.expert_rank), task.exchanged_bytes
        if holder != source or size > room:
            batches.append([])
            source, room = holder, limit
        batches[-1].append(task)
        room -= size
    return batches
