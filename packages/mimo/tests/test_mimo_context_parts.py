"""Sequences divided among context-parallel ranks: who holds what, and which ones cannot be divided."""

from typing import Any

import pytest
import torch
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.partition.utils import PartitionConfig

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.context_parts import ContextParts
from megatron.bridge.mimo.uneven_bridges import of_whole_sequences
from megatron.bridge.training.gpt_step import packed_documents


class Rank:
    """What is asked of a process group."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 2


def adapter(rank: int, length: int) -> ContextParts:
    config = PartitionConfig(
        seq_parallel=False, use_cp=True, tp_comm_overlap=False, max_seq_len=length, cp_group=Rank(rank)
    )
    return ContextParts(config)


def parts(length: int, bounds: list[int] | None = None) -> list[Any]:
    """Of both ranks: embeddings and labels of one row that say their places."""
    places = torch.arange(length)
    packed = None if bounds is None else packed_documents(torch.tensor([bounds]))
    found = []
    for rank in (0, 1):
        embeddings, labels, mask, _ = adapter(rank, length).shard(places.view(-1, 1, 1), places[None], None, packed)
        assert mask is None
        assert embeddings.shape == (length // 2, 1, 1)
        assert embeddings.flatten().equal(labels.flatten())
        found.append(labels.flatten().tolist())
    return found


def test_each_rank_has_the_same_work_in_every_document() -> None:
    assert parts(8, [0, 8]) == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert parts(12, [0, 4, 12]) == [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]


def test_positions_in_several_axes_go_with_their_tokens() -> None:
    positions = torch.arange(16).view(2, 1, 8)
    assert adapter(0, 8).positions(positions).tolist() == [[[0, 1, 6, 7]], [[8, 9, 14, 15]]]
    assert adapter(1, 8).positions(positions).tolist() == [[[2, 3, 4, 5]], [[10, 11, 12, 13]]]


def test_ranks_that_share_sequences_get_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "28")
    grid = HyperCommGrid([2, 3, 2, 2], ["tp", "cp", "dp", "pp"], rank_offset=4)
    seen = of_whole_sequences(grid)
    assert seen.get_rank_enum("tp") == [sorted(ranks) for ranks in grid.get_rank_enum(["tp", "cp"])]
    assert [seen.get_rank_enum(each) for each in ("dp", "pp")] == [grid.get_rank_enum(each) for each in ("dp", "pp")]
    assert seen.get_rank_enum("cp") == [[rank] for rank in range(4, 28)]


def test_what_cannot_be_cut_into_chunks_is_refused() -> None:
    with pytest.raises(
        BridgeError, match="samples of 6 tokens cannot be cut into 2 x context_parallel=2 chunks; .* 4$"
    ):
        parts(6)
    with pytest.raises(BridgeError, match="samples of 6 tokens cannot be cut"):
        adapter(0, 6).positions(torch.zeros(3, 1, 6))
    with pytest.raises(BridgeError, match="a packed document of 5 tokens cannot be cut into 2 x context_parallel_size"):
        parts(8, [0, 5, 8])
