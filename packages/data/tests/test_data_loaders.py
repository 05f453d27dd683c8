"""Batches: complete, disjoint, the same whatever the ranks, resumable at any step, and finite."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import Dataset

from megatron.bridge.data.loaders import MicroBatchSampler, OutOfSamples, build_data_iterator
from megatron.bridge.errors import BridgeError

SEQUENCE = 4


class Numbered(Dataset[dict[str, object]]):
    """Sample `i` is filled with `i`; `dataset_id` is what Megatron-Core's blended datasets add."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, object]:
        tokens = torch.full((SEQUENCE,), index)
        return {"tokens": tokens, "labels": tokens + 1, "loss_mask": torch.ones(SEQUENCE), "dataset_id": 0}


def _drawn(batches: Iterator[dict[str, torch.Tensor]], count: int) -> list[int]:
    return [int(row[0]) for _ in range(count) for row in next(batches)["tokens"]]


def test_batches_have_the_shape_of_a_micro_batch() -> None:
    batch = next(build_data_iterator(Numbered(16), micro_batch_size=2, global_batch_size=8))
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "tokens": (2, SEQUENCE),
        "labels": (2, SEQUENCE),
        "loss_mask": (2, SEQUENCE),
    }


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (2, 1), (8, 1), (1, 2), (2, 4), (1, 8)])
def test_every_step_draws_the_same_samples_on_any_number_of_ranks(micro: int, ranks: int) -> None:
    per_rank = 8 // (micro * ranks)
    streams = [build_data_iterator(Numbered(40), micro, 8, rank, ranks) for rank in range(ranks)]
    for step in range(5):
        drawn = [sample for stream in streams for sample in _drawn(stream, per_rank)]
        assert sorted(drawn) == list(range(8 * step, 8 * step + 8))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_continues_exactly(num_workers: int) -> None:
    whole = _drawn(build_data_iterator(Numbered(64), 2, 8, 1, 2), 16)
    begun = _drawn(build_data_iterator(Numbered(64), 2, 8, 1, 2), 6)
    resumed = build_data_iterator(Numbered(64), 2, 8, 1, 2, consumed_samples=24, num_workers=num_workers)
    assert begun + _drawn(resumed, 10) == whole


def test_resuming_on_other_ranks_and_with_another_batch_size_skips_nothing() -> None:
    before = _drawn(build_data_iterator(Numbered(64), 2, 8), 8)
    after = [
        sample
        for rank in range(2)
        for sample in _drawn(build_data_iterator(Numbered(64), 1, 16, rank, 2, consumed_samples=16), 16)
    ]
    assert sorted(before[:16] + after) == list(range(48))


def test_running_out_says_what_was_asked_and_found() -> None:
    batches = build_data_iterator(Numbered(21), 2, 4, 1, 2, consumed_samples=8)
    assert _drawn(batches, 3) == [10, 11, 14, 15, 18, 19]
    with pytest.raises(OutOfSamples, match=r"has 21 samples, .* up to 24 .*8 consumed before .* 3 steps drawn"):
        next(batches)
    with pytest.raises(OutOfSamples, match=r"has 21 samples, .* up to 104"):
        next(build_data_iterator(Numbered(21), 2, 4, consumed_samples=100))


def test_torchs_random_numbers_are_left_alone() -> None:
    before = torch.random.get_rng_state()
    next(build_data_iterator(Numbered(16), 1, 1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_length_is_the_number_of_micro_batches() -> None:
    for consumed in (0, 3, 24, 99):
        sampler = MicroBatchSampler(50, 2, 8, 0, 2, consumed)
        assert len(sampler) == len(list(sampler))


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"micro_batch_size": 3}, "global_batch_size=8 is not a multiple of micro_batch_size=3 x 1"),
        ({"micro_batch_size": 4, "dp_size": 4}, "x 4 data-parallel ranks = 16"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"micro_batch_size": 1, "dp_rank": 2, "dp_size": 2}, "rank 2 lies outside the 2"),
        ({"micro_batch_size": 1, "consumed_samples": -1}, "consumed_samples=-1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], complaint: str) -> None:
    with pytest.raises(BridgeError, match=complaint):
        build_data_iterator(Numbered(64), global_batch_size=8, **sizes)  # type: ignore[arg-type]
