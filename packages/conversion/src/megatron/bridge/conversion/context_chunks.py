"""Which part of a sequence a context-parallel rank holds, as Megatron-Core divides it.

A sequence is cut into 2 x CP chunks, and rank r holds the chunks r and 2 x CP - 1 - r: with causal attention, that is
the same work on every rank.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """Which of the 2 x `size` chunks of a sequence `rank` holds, in its order."""
    return rank, 2 * size - 1 - rank


def part_of_rank(whole: "torch.Tensor", rank: int, size: int, axis: int) -> "torch.Tensor":
    """What `rank` of `size` holds of a tensor with the sequence along `axis`."""
    import torch

    chunks = whole.chunk(2 * size, axis)
    return torch.cat([chunks[place] for place in chunks_of(rank, size)], axis)


def in_order(parts: "Sequence[torch.Tensor]", axis: int) -> "torch.Tensor":
    """The whole sequence of all ranks' parts, which are given in the order of the ranks."""
    import torch

    placed = {
        place: half
        for rank, part in enumerate(parts)
        for place, half in zip(chunks_of(rank, len(parts)), part.chunk(2, axis), strict=True)
    }
    return torch.cat([placed[place] for place in range(2 * len(parts))], axis)
