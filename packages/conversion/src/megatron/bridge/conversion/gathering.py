"""Whole Megatron weights on every rank, several of them in one exchange.

A batch travels as bytes, whatever its dtypes: those who hold parts gather them, then the weights go to the other
expert-parallel ranks and to the other pipeline stages. That is at most three collectives for the whole batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.bridge.conversion.export_tasks import ConversionTask
from megatron.bridge.conversion.live_weights import Layout
from megatron.bridge.conversion.shards import is_column

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 16  # bytes: any dtype may begin there


@dataclass(frozen=True)
class WeightGatherer:
    """Gathers the weights of one model.

    Args:
        layout: of the model.
        local: this rank's weights by canonical name.
        device: where exchanged bytes lie; None leaves each weight where it is, for a model on one rank.
    """

    layout: Layout
    local: "Mapping[str, torch.Tensor]"
    device: "torch.device | None"

    def gather(self, batch: Sequence[ConversionTask]) -> "Iterator[torch.Tensor]":
        """The whole weight of each task, in order; all must have the same holders. Collective.

        A weight that this rank holds whole is the model's own tensor. Each result should be let go before the next is
        asked for: the bytes that were exchanged are freed with the last one.
        """
        exchange = _Exchange(batch)
        received = [self._received(batch, exchange)] if self._exchanged(batch) else []
        for number, task in enumerate(batch):
            if self.holds_whole(task):
                yield self._own(task)
            else:
                # No name may hold what is yielded, nor the bytes that the last weight is made of.
                last = number == len(batch) - 1
                yield exchange.weight(number, received.pop() if last else received[0])

    def holds_whole(self, task: ConversionTask) -> bool:
        """Whether this rank's model holds the whole weight, so that it is given as it is."""
        return task.parts == 1 and self._holds(task)

    def _holds(self, task: ConversionTask) -> bool:
        layout = self.layout
        return layout.pipeline_rank == task.pipeline_ranks[0] and task.expert_rank in (None, layout.expert_rank)

    def _exchanged(self, batch: Sequence[ConversionTask]) -> bool:
        """Whether any rank lacks something of the batch; the same on every rank."""
        layout = self.layout
        expert = batch[0].expert_rank is not None and layout.expert_size > 1
        return expert or layout.pipeline_size > 1 or any(task.parts > 1 for task in batch)

    def _own(self, task: ConversionTask) -> "torch.Tensor":
        tensor = self.local[task.megatron].detach()
        return tensor if self.device is None else tensor.to(self.device)

    def _received(self, batch: Sequence[ConversionTask], exchange: "_Exchange") -> "torch.Tensor":
        """The batch's bytes, on every rank."""
        import torch
        import torch.distributed as dist

        layout, first = self.layout, batch[0]
        stage, expert = first.pipeline_ranks[0], first.expert_rank
        if self._holds(first):
            received = self._sent(batch, exchange)
        else:
            received = torch.empty(exchange.nbytes, dtype=torch.uint8, device=self.device)
        if expert is not None and layout.expert_size > 1 and layout.pipeline_rank == stage:
            dist.broadcast(received, group=layout.expert_group, group_src=expert)
        if layout.pipeline_size > 1:
            dist.broadcast(received, group=layout.pipeline_group, group_src=stage)
        return received

    def _sent(self, batch: Sequence[ConversionTask], exchange: "_Exchange") -> "torch.Tensor":
        """The batch's bytes, where its weights are: what each rank holds whole, then every rank's parts."""
        import torch
        import torch.distributed as dist

        if len(batch) == 1 and batch[0].parts == 1:
            return _as_bytes(self._own(batch[0]))
        sent = torch.empty(exchange.nbytes, dtype=torch.uint8, device=self.device)
        shared = [(number, task) for number, task in enumerate(batch) if task.parts == 1]
        divided = [(number, task) for number, task in enumerate(batch) if task.parts > 1]
        self._pack(sent[: exchange.shared_bytes], shared, exchange)
        if divided:
            if len(batch) == 1:
                part = _as_bytes(self._own(batch[0]))
            else:
                part = torch.empty(exchange.part_bytes, dtype=torch.uint8, device=self.device)
                self._pack(part, divided, exchange)
            group = self.layout.dividing(divided[0][1].rule.shard)
            dist.all_gather_into_tensor(sent[exchange.shared_bytes :], part, group=group)
        return sent

    def _pack(self, target: "torch.Tensor", tasks: Sequence[tuple[int, ConversionTask]], exchange: "_Exchange") -> None:
        for number, task in tasks:
            held, begin = _as_bytes(self._own(task)), exchange.begins[number]
            target[begin : begin + held.numel()].copy_(held)


class _Exchange:
    """Where the weights of a batch lie among its bytes: `[shared | parts of rank 0 | parts of rank 1 | ...]`."""

    def __init__(self, batch: Sequence[ConversionTask]) -> None:
        self._batch = batch
        self._size = max(task.parts for task in batch)
        self.begins: list[int] = []
        ends = {True: 0, False: 0}
        for task in batch:
            held = task.exchanged_bytes // task.parts
            self.begins.append(ends[task.parts > 1])
            # A weight that travels alone needs no room around it.
            ends[task.parts > 1] += held if len(batch) == 1 else -(-held // _ALIGNMENT) * _ALIGNMENT
        self.shared_bytes, self.part_bytes = ends[False], ends[True]

    @property
    def nbytes(self) -> int:
        return self.shared_bytes + self._size * self.part_bytes

    def weight(self, number: int, received: "torch.Tensor") -> "torch.Tensor":
        """The whole weight that is `number` in the batch."""
        task = self._batch[number]
        shape = task.rule.shard.local_shape(task.shape, task.parts)
        length = task.exchanged_bytes // task.parts
        first = self.begins[number] + (self.shared_bytes if task.parts > 1 else 0)
        starts = (first + rank * self.part_bytes for rank in range(task.parts))
        parts = [received[start : start + length].view(task.held).view(shape) for start in starts]
        if task.parts > 1 and len(self._batch) == 1 and is_column(task.rule.shard):
            return received.view(task.held).view(task.shape)  # the parts lie there as they belong
        if task.parts > 1:
            return task.rule.shard.join(parts)
        # A view would keep the bytes of the whole batch alive.
        return parts[0].clone() if len(self._batch) > 1 else parts[0]


def _as_bytes(tensor: "torch.Tensor") -> "torch.Tensor":
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)
