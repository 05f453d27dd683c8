"""Reads single weights of a Megatron distributed checkpoint, whatever layout wrote it, without loading the rest."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.checkpoint_layout import METADATA_FILE, CheckpointError, resolve
from megatron.bridge.conversion.megatron_checkpoint import BESIDES_WEIGHTS
from megatron.bridge.conversion.offline.keys import Place, stored_weights
from megatron.bridge.conversion.offline.tensor_archive import read_tensor
from megatron.bridge.conversion.table import WeightTable
from megatron.bridge.conversion.transforms import Region, Shape, whole

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_MODEL = "model."


@dataclass(frozen=True)
class StoredWeight:
    """A weight of a checkpoint: where it lies, its global shape and dtype."""

    place: Place
    shape: Shape
    dtype: "torch.dtype"


class MegatronWeights(Mapping[str, StoredWeight]):
    """The weights of a checkpoint by canonical name; optimizer and random state of a run are passed over.

    Opening reads the metadata only and proves that every file is there and long enough.

    Args:
        path: a checkpoint root (its latest iteration is taken) or one iteration folder.
        table: the family's rules, which say how stacked keys unfold into layers.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
    """

    def __init__(self, path: str | Path, table: WeightTable) -> None:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        from megatron.bridge.conversion.dist_checkpoint import check_files, read_metadata

        self.folder = resolve(path)
        metadata = read_metadata(self.folder)
        try:
            check_files(self.folder, metadata)
            self._entries: dict[str, TensorStorageMetadata] = {
                key: entry
                for key, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata) and not key.startswith(BESIDES_WEIGHTS)
            }
            self._stored = metadata.storage_data
            for key, entry in self._entries.items():
                _refuse_gaps(key, entry, self._stored)
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder / METADATA_FILE} is damaged ({error}); take another copy of the checkpoint"
            ) from error
        # Key and number of leading axes -> the chunks at each of their entries.
        self._by_leading: dict[tuple[str, int], dict[Shape, list[Any]]] = {}
        # Some versions of Megatron-LM put this before every key of the model.
        self._prefix = _MODEL if self._entries and all(key.startswith(_MODEL) for key in self._entries) else ""
        shapes = {key.removeprefix(self._prefix): tuple(entry.size) for key, entry in self._entries.items()}
        self._weights = {
            name: StoredWeight(place, shape, self._entry(place).properties.dtype)
            for name, (place, shape) in stored_weights(table, shapes).items()
        }

    def _entry(self, place: Place) -> "TensorStorageMetadata":
        return self._entries[self._prefix + place.key]

    def __getitem__(self, name: str) -> StoredWeight:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Canonical name -> global shape."""
        return {name: weight.shape for name, weight in self._weights.items()}

    @property
    def files(self) -> list[Path]:
        """The metadata and every file it names."""
        names = sorted({info.relative_path for info in self._stored.values()})
        return [self.folder / METADATA_FILE, *(self.folder / name for name in names)]

    def read(self, name: str, region: Region | None = None) -> "torch.Tensor":
        """A weight, or a region of it, on the CPU: a view of one stored chunk where it lies in one, else a copy.

        Raises:
            CheckpointError: a chunk is damaged, or the chunks leave a gap.
        """
        import torch

        weight = self._weights[name]
        own = whole(weight.shape) if region is None else region
        window: Region = (*((entry, entry + 1) for entry in weight.place.leading), *own)
        shape = [stop - start for start, stop in own]
        result: torch.Tensor | None = None
        filled = 0
        for index, chunk in self._chunks(weight.place):
            overlap = _overlap(window, tuple(chunk.offsets), tuple(chunk.sizes))
            if overlap is None:
                continue
            source, target = overlap
            piece = self._load(index, chunk, weight.dtype)[source]
            if piece.numel() == math.prod(shape):
                return piece.reshape(shape)
            if result is None:
                result = torch.empty([stop - start for start, stop in window], dtype=weight.dtype)
            result[target] = piece
            filled += piece.numel()
        if result is None or filled != math.prod(shape):
            raise CheckpointError(f"{self.folder} holds {filled} of the {math.prod(shape)} elements of {name}")
        return result.reshape(shape)

    def row_runs(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Rows `start` to `stop` of a weight in runs that its stored chunks do not cross."""
        place = self._weights[name].place
        depth = len(place.axes)
        edges = (edge for _, chunk in self._chunks(place) for edge in _extent(chunk, depth))
        cuts = [start, *sorted({edge for edge in edges if start < edge < stop}), stop]
        yield from pairwise(cuts)

    def _chunks(self, place: Place) -> list[Any]:
        """(index, chunk) of the stored chunks that hold some of a weight."""
        from torch.distributed.checkpoint.metadata import MetadataIndex

        depth = len(place.axes)
        by_leading = self._by_leading.get((place.key, depth))
        if by_leading is None:
            by_leading = self._by_leading[place.key, depth] = _by_leading(self._entry(place).chunks, depth)
        return [
            (MetadataIndex(self._prefix + place.key, chunk.offsets), chunk)
            for chunk in by_leading.get(place.leading, ())
        ]

    def _load(self, index: Any, chunk: Any, dtype: "torch.dtype") -> "torch.Tensor":
        import torch

        info = self._stored.get(index)
        what = f"{index.fqn} {list(chunk.offsets)}"
        if info is None:
            raise CheckpointError(f"{self.folder}: the metadata does not say where {what} lies; take another copy")
        path = self.folder / info.relative_path
        damaged = f"{path} is damaged at byte {info.offset}, where {what} lies: "
        try:
            tensor = read_tensor(path, info.offset, info.length)
        except Exception as error:
            raise CheckpointError(f"{damaged}{error}; take another copy of the checkpoint") from error
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{damaged}it holds a {type(tensor).__name__}; take another copy of the checkpoint")
        if tuple(tensor.shape) != tuple(chunk.sizes) or tensor.dtype != dtype:
            raise CheckpointError(
                f"{damaged}it holds {tensor.dtype} {list(tensor.shape)}, the metadata says {dtype} "
                f"{list(chunk.sizes)}; take another copy of the checkpoint"
            )
        return tensor


def _refuse_gaps(key: str, entry: Any, stored: Mapping[Any, Any]) -> None:
    """Refuse a description whose chunks do not fill the tensor, or are larger than the bytes that hold them."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    size = tuple(entry.size)
    filled = 0
    for chunk in entry.chunks:
        info = stored.get(MetadataIndex(key, chunk.offsets))
        count = math.prod(chunk.sizes)
        inside = len(size) == len(chunk.offsets) == len(chunk.sizes) and all(
            min(start, length) >= 0 and start + length <= end
            for start, length, end in zip(chunk.offsets, chunk.sizes, size, strict=True)
        )
        if not inside or info is None or count * entry.properties.dtype.itemsize > info.length:
            raise ValueError(f"its entry for {key} {list(chunk.offsets)} fits neither the tensor nor the stored bytes")
        filled += count
    if filled != math.prod(size):
        raise ValueError(f"its chunks of {key} hold {filled} elements, its shape {list(size)} needs {math.prod(size)}")


def _by_leading(chunks: Iterable[Any], depth: int) -> dict[Shape, list[Any]]:
    """Chunks by each entry of the first `depth` axes that they hold some of."""
    found: dict[Shape, list[Any]] = defaultdict(list)
    for chunk in chunks:
        runs = (
            range(start, start + size) for start, size in zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)
        )
        for leading in product(*runs):
            found[leading].append(chunk)
    return found


def _extent(chunk: Any, axis: int) -> tuple[int, int]:
    return chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis]


def _overlap(window: Any, offsets: Shape, sizes: Shape) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a chunk and the window meet: slices of the chunk, slices of the window."""
    source, target = [], []
    for (start, stop), offset, size in zip(window, offsets, sizes, strict=True):
        low, high = max(start, offset), min(stop, offset + size)
        if low >= high:
            return None
        source.append(slice(low - offset, high - offset))
        target.append(slice(low - start, high - start))
    return tuple(source), tuple(target)
