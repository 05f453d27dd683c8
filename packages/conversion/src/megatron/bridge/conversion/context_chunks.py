"""Which part of a sequence a context-parallel rank holds, as Megatron-Core divides it.

A sequence is cut into 2 x CP chunks, and rank r holds the chunks r and 2 x CP - 1 - r: with causal attention, that is
the same work on every rank. Of a packed sequence, each document is cut so by itself.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron.bridge.errors import BridgeError

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


def packed_rows_of_rank(bounds: Sequence[int], rank: int, size: int) -> "torch.Tensor":
    """Which rows of a packed sequence `rank` of `size` holds, in its order: its two chunks of each document.

    Args:
        bounds: where each document begins, and where the last one ends, `[documents + 1]`.
        rank: of this part.
        size: number of parts.

    Raises:
        BridgeError: a document cannot be cut into 2 x `size` chunks.
    """
    import torch

    rows = []
    for start, stop in itertools.pairwise(bounds):
        chunk, left = divmod(stop - start, 2 * size)
        if left:
            raise BridgeError(
                f"a packed document of {stop - start} tokens cannot be cut into 2 x context_parallel_size={size} "
                f"chunks; fill documents up to a multiple of {2 * size}"
            )
        rows += [torch.arange(chunk) + start + place * chunk for place in chunks_of(rank, size)]
    return torch.cat(rows)


def packed_in_order(bounds: Sequence[int], size: int) -> "torch.Tensor":
    """Where, in the parts of all ranks one after another, each row of the packed sequence stands."""
    import torch

    return torch.argsort(torch.cat([packed_rows_of_rank(bounds, rank, size) for rank in range(size)]))
