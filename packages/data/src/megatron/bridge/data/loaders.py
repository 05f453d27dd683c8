"""From a map-style dataset to the batches of one rank: ordered, deterministic, resumable at any sample.

A step draws the next `global_batch_size` samples, a number that may grow during the run. Ranks take turns of
`micro_batch_size` within it, so the samples of a step stay the same when the number of ranks changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, default_collate

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from torch import Tensor

# BlendedDataset says where a sample came from; a forward step has no use for it.
_NOT_FOR_THE_MODEL = frozenset({"dataset_id"})


class OutOfSamples(BridgeError):
    """The run asks for more samples than the dataset holds."""


class MicroBatchSampler:
    """Indices of this rank's micro-batches, in order, from `consumed_samples` on; stops before a partial step.

    `global_batch_size` may be a function that gives a step's size from the samples drawn before it.
    """

    def __init__(
        self,
        num_samples: int,
        micro_batch_size: int,
        global_batch_size: int | Callable[[int], int],
        dp_rank: int,
        dp_size: int,
        consumed_samples: int,
    ) -> None:
        self.batch_size_at = global_batch_size if callable(global_batch_size) else lambda consumed: global_batch_size
        _check_sizes(micro_batch_size, self.batch_size_at(consumed_samples), dp_rank, dp_size, consumed_samples)
        self.num_samples = num_samples
        self.micro_batch_size = micro_batch_size
        self.stride = micro_batch_size * dp_size
        self.offset = micro_batch_size * dp_rank
        self.consumed_samples = consumed_samples

    def __iter__(self) -> Iterator[list[int]]:
        for begin, end in self.steps():
            for block in range(begin, end, self.stride):
                first = block + self.offset
                yield list(range(first, first + self.micro_batch_size))

    def __len__(self) -> int:
        return sum((end - begin) // self.stride for begin, end in self.steps())

    def steps(self) -> Iterator[tuple[int, int]]:
        """First sample of each step that can be filled, and the one after its last."""
        begin = self.consumed_samples
        while (end := begin + self.batch_size_at(begin)) <= self.num_samples:
            yield begin, end
            begin = end


def build_data_iterator(
    dataset: Any,
    micro_batch_size: int,
    global_batch_size: int | Callable[[int], int],
    dp_rank: int = 0,
    dp_size: int = 1,
    consumed_samples: int = 0,
    num_workers: int = 0,
    seed: int = 1234,
    pin_memory: bool = False,
) -> MicroBatches:
    """This rank's micro-batches: dicts of `tokens`, `labels`, `loss_mask`, `position_ids`, each [micro_batch, seq].

    `attention_mask`, [micro_batch, 1, seq, seq], is there when the dataset makes one.

    Args:
        dataset: a map-style dataset whose order is its own (Megatron-Core's are shuffled when built). Samples that
            are more than tensors of one shape are put together by a function `collate` of its own.
        micro_batch_size, global_batch_size: samples per forward on one rank, and per step on all ranks; the latter may
            be a function that gives it from the samples drawn before the step.
        dp_rank, dp_size: this rank's place among the data-parallel ranks.
        consumed_samples: where to start: the samples that all ranks together have drawn before.
        num_workers: processes that load ahead; 0 loads here.
        seed: seeds the workers; torch's own generator is never drawn from, so that resuming stays exact.
        pin_memory: page-locked batches, for copies to a GPU that overlap with work.

    Raises:
        BridgeError: sizes that do not fit each other.
        OutOfSamples: from `next`, when the dataset cannot fill one more step.
    """
    num_samples = len(dataset)
    sampler = MicroBatchSampler(num_samples, micro_batch_size, global_batch_size, dp_rank, dp_size, consumed_samples)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=getattr(dataset, "collate", None) or _collate,
        generator=torch.Generator().manual_seed(seed),
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_rank,
    )
    return MicroBatches(sampler, _until_exhausted(loader, sampler))


class MicroBatches(Iterator["dict[str, Tensor]"]):
    """The micro-batches of one rank; knows how far it has got, whatever workers have loaded ahead."""

    def __init__(self, sampler: MicroBatchSampler, batches: Iterator[dict[str, Tensor]]) -> None:
        self._sampler, self._batches, self._drawn = sampler, batches, 0

    def __next__(self) -> dict[str, Tensor]:
        batch = next(self._batches)
        self._drawn += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """`consumed_samples`: those that all ranks have drawn together when each has drawn as many as this one."""
        return {"consumed_samples": self._sampler.consumed_samples + self._drawn * self._sampler.stride}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state, of any number of ranks; only before the first batch.

        Raises:
            BridgeError: batches have been drawn already.
        """
        if self._drawn:
            raise BridgeError(
                f"{self._drawn} micro-batches have been drawn already; load the state before the first one"
            )
        self._sampler.consumed_samples = state["consumed_samples"]


def _leave_signals_to_the_rank(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group. The rank finishes its step and saves, and for that
    # it needs its workers; it can still end them itself.
    os.setpgid(0, 0)


def _until_exhausted(loader: DataLoader[Any], sampler: MicroBatchSampler) -> Iterator[dict[str, Tensor]]:
    yield from loader
    drawn = list(sampler.steps())
    steps, end = len(drawn), drawn[-1][1] if drawn else sampler.consumed_samples
    size = sampler.batch_size_at(end)
    asked = end + size
    raise OutOfSamples(
        f"the dataset has {sampler.num_samples} samples, and the next step asks for samples up to {asked} "
        f"(global_batch_size={size}, {sampler.consumed_samples} consumed before this iterator was built, "
        f"{steps} steps drawn from it); train for fewer steps, or build the dataset with at least {asked} samples"
    )


def _collate(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    kept = [{key: value for key, value in sample.items() if key not in _NOT_FOR_THE_MODEL} for sample in samples]
    batch: dict[str, Tensor] = default_collate(kept)
    return batch


def _check_sizes(
    micro_batch_size: int, global_batch_size: int, dp_rank: int, dp_size: int, consumed_samples: int
) -> None:
    if micro_batch_size < 1 or global_batch_size < 1:
        raise BridgeError(
            f"micro_batch_size={micro_batch_size} and global_batch_size={global_batch_size} must be at least 1"
        )
    if not 0 <= dp_rank < dp_size:
        raise BridgeError(f"data-parallel rank {dp_rank} lies outside the {dp_size} data-parallel ranks")
    if global_batch_size % (micro_batch_size * dp_size):
        raise BridgeError(
            f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size={micro_batch_size} x "
            f"{dp_size} data-parallel ranks = {micro_batch_size * dp_size}; change one of them"
        )
    if consumed_samples < 0:
        raise BridgeError(f"consumed_samples={consumed_samples} must not be negative")
