"""Packing is first-fit decreasing, and fills."""

import resource

import numpy as np
import pytest

from megatron.bridge.data.packing import pack
from megatron.bridge.errors import BridgeError


def by_definition(lengths: list[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing, word for word."""
    packs: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        for each in packs:
            if sum(lengths[other] for other in each) + lengths[document] <= capacity:
                each.append(document)
                break
        else:
            packs.append([document])
    return packs


def test_it_is_first_fit_decreasing() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        capacity = int(random.integers(3, 40))
        lengths = random.integers(1, capacity + 1, int(random.integers(1, 60)))
        packs = pack(lengths, capacity)
        assert [packs[at].tolist() for at in range(len(packs))] == by_definition(lengths.tolist(), capacity)
        assert packs.efficiency == lengths.sum() / (len(packs) * capacity)


@pytest.mark.parametrize("kind", ["lognormal", "uniform"])
@pytest.mark.parametrize("capacity", [2048, 32768])
def test_100k_documents_are_packed_full_and_fast(kind: str, capacity: int) -> None:
    random = np.random.default_rng(1)
    drawn = random.lognormal(6, 1, 100_000) if kind == "lognormal" else random.uniform(1, capacity, 100_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    packs = pack(np.clip(drawn, 1, capacity).astype(np.int64), capacity)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 2  # CPU seconds: the machine may be busy
    assert packs.efficiency >= 0.98
    assert np.array_equal(np.sort(packs.order), np.arange(100_000))


def test_what_cannot_be_packed_is_refused() -> None:
    for lengths, why in (([], "no documents"), ([3, 9], "has 9 tokens"), ([0, 3], "has 0 tokens")):
        with pytest.raises(BridgeError, match=why):
            pack(np.array(lengths, np.int64), 8)
