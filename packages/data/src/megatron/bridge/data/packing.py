"""Which documents share a sequence: first-fit decreasing (Johnson, 1973), document lengths in, packs out."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron.bridge.errors import BridgeError


@dataclass(frozen=True)
class Packs:
    """Pack `p` holds the documents `order[bounds[p]:bounds[p + 1]]`."""

    order: NDArray[np.int64]
    bounds: NDArray[np.int64]
    capacity: int
    tokens: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, pack: int) -> NDArray[np.int64]:
        return self.order[self.bounds[pack] : self.bounds[pack + 1]]

    @property
    def efficiency(self) -> float:
        """Which part of the packs is filled, from 0 to 1."""
        return self.tokens / (len(self) * self.capacity)


def pack(lengths: NDArray[np.int64], capacity: int) -> Packs:
    """Put every document into the first pack with room for it, the longest first; equal ones in their order.

    Args:
        lengths: of each document, `[documents]`, from 1 to `capacity`.
        capacity: of a pack.

    Raises:
        BridgeError: no documents, or one that fits no pack.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) == 0:
        raise BridgeError("there are no documents to pack")
    if lengths.min() < 1 or lengths.max() > capacity:
        wrong = int(lengths.max() if lengths.max() > capacity else lengths.min())
        raise BridgeError(f"a document has {wrong} tokens; those that are packed have from 1 to {capacity}")
    by_length = np.argsort(-lengths, kind="stable")
    pack_of = _first_fit(lengths[by_length].tolist(), capacity)
    order = by_length[np.argsort(pack_of, kind="stable")]
    bounds = np.concatenate(([0], np.cumsum(np.bincount(pack_of))))
    return Packs(order, bounds, capacity, int(lengths.sum()))


def _first_fit(lengths: list[int], capacity: int) -> NDArray[np.int64]:
    """The pack of each document. The packs stand in rows of a square, so that a search looks at two rows of it."""
    side = math.isqrt(len(lengths) - 1) + 1
    room = np.full((side, side), capacity, np.int64)
    most = np.full(side, capacity, np.int64)  # room in each row
    pack_of = np.empty(len(lengths), np.int64)
    for document, length in enumerate(lengths):
        row = (most >= length).argmax()
        packs = room[row]
        place = (packs >= length).argmax()
        packs[place] -= length
        most[row] = packs.max()
        pack_of[document] = row * side + place
    return pack_of
