"""Samples with images packed: several of a dataset, each a document, make up one of full length. Imports torch."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron.bridge.data.packing import pack
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.data import collate, items_together
from megatron.bridge.mimo.documents import BOUNDS
from megatron.bridge.mimo.slices import MODALITIES

_TEXTS = ("tokens", "labels", "loss_mask", "position_ids")


class PackedSamples(Dataset[dict[str, Any]]):
    """Samples of `sequence_length` tokens, each of several documents with their items.

    A document is a sample of another dataset, as long as it is, not filled up. Its labels and its loss mask are its
    own, so that no prediction across documents counts; its positions begin anew. What is left at the end of a sample is
    one more document, of padding. Which documents share a sample is decided by first-fit decreasing.

    Args:
        dataset: map-style; its samples are as `collate` takes them, and their lengths may differ. `position_ids` may be
            left out.
        sequence_length: tokens of a packed sample.
        lengths: tokens of each document; None reads all samples of `dataset` once to know.
        seed: of the order of samples, and of which documents of one length share one; None keeps the dataset's order.
        pad: id that fills up; it must not stand for an item.
        multiple: what each document is filled up to a multiple of; context-parallel ranks cut it into twice as many
            chunks as they are.

    Raises:
        BridgeError: there is no document, or one that is longer than a sample; or samples are no such multiple.
    """

    collate = staticmethod(collate)

    def __init__(
        self,
        dataset: Any,
        sequence_length: int,
        *,
        lengths: Sequence[int] | None = None,
        seed: int | None = 1234,
        pad: int = 0,
        multiple: int = 1,
    ) -> None:
        self.dataset, self.sequence_length, self.pad = dataset, sequence_length, pad
        if lengths is None:
            lengths = [len(dataset[index]["tokens"]) for index in range(len(dataset))]
        if len(lengths) != len(dataset):
            raise BridgeError(f"lengths has {len(lengths)} numbers for {len(dataset)} samples; give one for each")
        if sequence_length % multiple:
            raise BridgeError(
                f"sequence_length={sequence_length} is no multiple of {multiple}, which documents are filled up to; "
                f"{max(sequence_length // multiple, 1) * multiple} would do"
            )
        self._lengths = np.asarray(lengths, np.int64)
        self._filled = -(-self._lengths // multiple) * multiple
        self._documents = _order(len(lengths), seed)
        self.packs = pack(self._filled[self._documents], sequence_length)
        self._samples = _order(len(self.packs), seed)
        self.notices = [f"{len(lengths):,} samples in {len(self.packs):,} packs, {self.efficiency:.1%} full"]

    @property
    def efficiency(self) -> float:
        """Which part of the samples is no padding, from 0 to 1."""
        return float(self._lengths.sum()) / (len(self.packs) * self.sequence_length)

    def documents(self, index: int) -> list[int]:
        """Numbers in the dataset of the documents of a sample, in their order."""
        return [int(each) for each in self._documents[self.packs[int(self._samples[index])]]]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        parts = [self._document(number) for number in self.documents(index)]
        left = self.sequence_length - sum(len(part["tokens"]) for part in parts)
        parts += [self._padding(left)] if left else []
        bounds = [0, *itertools.accumulate(len(part["tokens"]) for part in parts)]
        return {
            **{name: torch.cat([part[name] for part in parts]) for name in _TEXTS},
            BOUNDS: torch.tensor(bounds, dtype=torch.int32),
            MODALITIES: items_together([part.get(MODALITIES) or {} for part in parts]),
        }

    def _document(self, number: int) -> dict[str, Any]:
        sample: Mapping[str, Any] = self.dataset[number]
        length = int(self._lengths[number])
        document = {"position_ids": torch.arange(length), **sample}
        if others := sorted(document.keys() - {*_TEXTS, MODALITIES}):
            raise BridgeError(f"sample {number} has {', '.join(others)}, which cannot be packed; leave it out")
        shapes = {name: list(document[name].shape) for name in _TEXTS if name in document}
        if len(shapes) < len(_TEXTS) or any(shape != [length] for shape in shapes.values()):
            raise BridgeError(
                f"sample {number} has {shapes}; a document of {length} tokens needs {', '.join(_TEXTS[:3])}, each "
                f"[{length}]"
            )
        fill = self._padding(int(self._filled[number]) - length)
        return document | {name: torch.cat([document[name], fill[name]]) for name in _TEXTS}

    def _padding(self, length: int) -> dict[str, Tensor]:
        fill = torch.full((length,), self.pad)
        return {"tokens": fill, "labels": fill, "loss_mask": torch.zeros(length), "position_ids": torch.arange(length)}


def _order(count: int, seed: int | None) -> "np.typing.NDArray[np.int64]":
    return np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
