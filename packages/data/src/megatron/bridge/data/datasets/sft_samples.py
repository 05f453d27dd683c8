"""Samples of tokenized conversations: padded one by one, or packed. Imports torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from megatron.bridge.data.instruction.store import EncodedStore
    from megatron.bridge.data.packing import Packs


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """What samples look like and how many there are.

    Attributes:
        length: tokens of a sample.
        samples: how many samples the dataset has, over several passes; None for one pass.
        seed: seeds the order, anew for each pass. None keeps the order of the rows, for evaluation: there are whole
            passes only, and what is asked for beyond them is padding, so that no row counts more than another.
        pad: id that fills up; it is never trained.
    """

    length: int
    samples: int | None
    seed: int | None
    pad: int


class SFTDataset(Dataset[dict[str, "Tensor"]]):
    """One conversation per sample, padded.

    Args:
        store: tokenized conversations.
        members: those of this split.
        settings: length, number and order.
        notices: what the run should tell of the data.
    """

    def __init__(
        self, store: EncodedStore, members: NDArray[np.int64], settings: SampleSettings, notices: Sequence[str] = ()
    ) -> None:
        self._store, self._members, self.notices = store, members, notices
        self.length, self.pad, self._seed = settings.length, settings.pad, settings.seed
        self._samples = self.units if settings.samples is None else settings.samples
        self._pass, self._order = -1, np.empty(0, np.int64)

    @property
    def units(self) -> int:
        """Different samples: those of one pass."""
        return len(self._members)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._samples:
            raise IndexError(index)
        return self._blank() if self._is_beyond(index) else self._sample(self._unit(index))

    def _is_beyond(self, index: int) -> bool:
        """Whether an evaluation has ended before this sample."""
        return self._seed is None and self._samples > self.units and index >= self._samples // self.units * self.units

    def _blank(self) -> dict[str, Tensor]:
        return self._empty()

    def _unit(self, index: int) -> int:
        turn, place = divmod(index, self.units)
        if self._seed is None:
            return place
        if turn != self._pass:  # the order of a pass depends on the seed and on which pass it is, nothing else
            self._pass, self._order = turn, np.random.default_rng([self._seed, turn]).permutation(self.units)
        return int(self._order[place])

    def _sample(self, unit: int) -> dict[str, Tensor]:
        sample = self._empty()
        self._put(sample, 0, int(self._members[unit]))
        return sample

    def _empty(self) -> dict[str, Tensor]:
        """A sample of padding, each `[length]`; positions run through, so that a causal model reads what is put in."""
        return {
            "tokens": torch.full((self.length,), self.pad),
            "labels": torch.full((self.length,), self.pad),
            "loss_mask": torch.zeros(self.length),
            "position_ids": torch.arange(self.length),
        }

    def _put(self, sample: dict[str, Tensor], start: int, member: int) -> None:
        """A conversation from `start` on: every token but the last, every token but the first as its label."""
        encoded = self._store[member]
        stop = start + len(encoded.ids) - 1
        ids = torch.from_numpy(encoded.ids.astype(np.int64))
        sample["tokens"][start:stop] = ids[:-1]
        sample["labels"][start:stop] = ids[1:]
        sample["loss_mask"][start:stop] = torch.from_numpy(encoded.trained[1:].astype(np.float32))


class PackedSFTDataset(SFTDataset):
    """Several conversations per sample; `cu_seqlens` `[documents + 1]` says where each begins and the last one ends.

    Positions begin anew with each. Each is filled up to a `multiple`, so that context-parallel ranks hold equal parts
    of it; what is left at the end is one more document, of padding.
    """

    def __init__(
        self,
        store: EncodedStore,
        members: NDArray[np.int64],
        settings: SampleSettings,
        notices: Sequence[str] = (),
        *,
        packs: Packs,
        multiple: int = 1,
    ) -> None:
        self.packs, self._multiple = packs, multiple
        super().__init__(store, members, settings, notices)

    @property
    def units(self) -> int:
        return len(self.packs)

    def _blank(self) -> dict[str, Tensor]:
        return self._empty() | {"cu_seqlens": torch.tensor([0, self.length], dtype=torch.int32)}

    def _sample(self, unit: int) -> dict[str, Tensor]:
        sample, bounds = self._empty(), [0]
        for place in self.packs[unit]:
            member = int(self._members[place])
            self._put(sample, bounds[-1], member)
            tokens = len(self._store[member].ids) - 1
            bounds.append(bounds[-1] + -(-tokens // self._multiple) * self._multiple)
        if bounds[-1] < self.length:
            bounds.append(self.length)
        for start, stop in itertools.pairwise(bounds):
            sample["position_ids"][start:stop] = torch.arange(stop - start)
        sample["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
        return sample


class PairDataset(PackedSFTDataset):
    """Two conversations per sample, the better one first; `pair` `[]` numbers it over all splits, -1 for none."""

    def _blank(self) -> dict[str, Tensor]:
        return super()._blank() | {"pair": torch.tensor(-1)}

    def _sample(self, unit: int) -> dict[str, Tensor]:
        return super()._sample(unit) | {"pair": torch.tensor(int(self._members[2 * unit]))}
