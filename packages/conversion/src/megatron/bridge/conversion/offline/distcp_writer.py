"""Writes the files of a Megatron distributed checkpoint (torch_dist) one tensor at a time.

torch's own planner and writer want every tensor of a file at hand, and forget what they wrote when they are killed.
The format is theirs: each entry of a file is a `torch.save` archive, and `.metadata` says where each lies.
"""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from zlib_ng.zlib_ng import crc32

from megatron.bridge.conversion.checkpoint_layout import METADATA_FILE
from megatron.bridge.conversion.hf.shard_files import PIECE_BYTES
from megatron.bridge.conversion.offline.journal import Part
from megatron.bridge.conversion.offline.keys import Place
from megatron.bridge.conversion.offline.tensor_archive import write_tensor
from megatron.bridge.conversion.plan import PlanItem
from megatron.bridge.conversion.transforms import Concatenate, Region, Shape

if TYPE_CHECKING:
    import torch

# Small enough for the allocator to use the same memory again, and for the processor's cache; large enough for the disk.
CHUNK_BYTES = 16 * 2**20
FILE_BYTES = 256 * 2**20
_BUFFER_BYTES = 2**17  # collects small records; what is larger goes past it
CORE_METADATA = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


@dataclass(frozen=True)
class Chunk:
    """One entry of a file: a region of a weight."""

    item: PlanItem
    place: Place
    region: Region
    dtype: "torch.dtype"

    @property
    def offsets(self) -> Shape:
        """Where it begins in the checkpoint's tensor."""
        return (*self.place.leading, *(start for start, _ in self.region))

    @property
    def sizes(self) -> Shape:
        """Its sizes, with the layer axis where there is one."""
        return (*(1 for _ in self.place.leading), *(stop - start for start, stop in self.region))

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        count = self.dtype.itemsize
        for size in self.sizes:
            count *= size
        return count

    @property
    def label(self) -> str:
        """Its name in a journal."""
        return f"{self.place.key}@{','.join(map(str, self.offsets))}"


@dataclass(frozen=True)
class CheckpointFile:
    """A file to write, by its final name."""

    name: str
    chunks: tuple[Chunk, ...] = ()
    objects: tuple[tuple[str, Any], ...] = ()


def chunks_of(item: PlanItem, place: Place, dtype: "torch.dtype", limit: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """A weight in runs of rows of at most `limit` bytes (at least one row each), none of two Hugging Face weights."""
    if not item.shape:
        yield Chunk(item, place, (), dtype)
        return
    rest: Region = tuple((0, size) for size in item.shape[1:])
    row_bytes = item.numel * dtype.itemsize // max(item.shape[0], 1)
    transform = item.rule.transform
    parts = transform.count if isinstance(transform, Concatenate) and transform.axis == 0 else 1
    size = item.shape[0] // parts
    pieces = max(1, -(-size * row_bytes // limit))
    step = max(1, -(-size // pieces))
    for first in range(0, max(item.shape[0], 1), max(size, 1)):
        for start in range(first, first + max(size, 1), step):
            yield Chunk(item, place, ((start, min(start + step, first + size)), *rest), dtype)


def lay_out(chunks: Iterable[Chunk], objects: Mapping[str, Any], limit: int = FILE_BYTES) -> list[CheckpointFile]:
    """Chunks in order, spread over files of about `limit` bytes; the objects have a file of their own."""
    groups: list[list[Chunk]] = [[]]
    filled = 0
    for chunk in chunks:
        if groups[-1] and filled + chunk.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(chunk)
        filled += chunk.nbytes
    files = [CheckpointFile(f"__{number}_0.distcp", tuple(group)) for number, group in enumerate(groups)]
    return [*files, CheckpointFile(f"__{len(files)}_0.distcp", objects=tuple(objects.items()))]


class _Summed:
    """A stream that sums up what is written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.begin = self.end = self.crc = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, view.nbytes, PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self.crc = crc32(piece, self.crc)
            self._stream.write(piece)
        self.end += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Nothing: the file is flushed once, when it is complete."""

    def part(self, name: str) -> Part:
        """What was written since the last call."""
        part = Part(name, self.begin, self.end - self.begin, self.crc)
        self.begin, self.crc = self.end, 0
        return part


def write_file(path: Path, file: CheckpointFile, read: "Callable[[Chunk], torch.Tensor]") -> list[Part]:
    """Write a file's entries, each read only when its turn comes; returns where they lie."""
    import torch

    parts = []
    with path.open("wb", buffering=_BUFFER_BYTES) as stream:
        summed = _Summed(stream)
        for chunk in file.chunks:
            write_tensor(summed, _cast(read(chunk), chunk))  # type: ignore[arg-type]
            parts.append(summed.part(chunk.label))
        for key, value in file.objects:
            torch.save([value], summed)  # type: ignore[arg-type]
            parts.append(summed.part(key))
    return parts


def _cast(tensor: "torch.Tensor", chunk: Chunk) -> "torch.Tensor":
    tensor = tensor.to(chunk.dtype) if tensor.is_floating_point() else tensor
    return tensor.detach().contiguous().reshape(chunk.sizes)


def write_metadata(folder: Path, files: Iterable[CheckpointFile], written: Mapping[str, list[Part]]) -> None:
    """Write `.metadata` and `metadata.json`, from what is in the files."""
    from torch.distributed.checkpoint import Metadata
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata

    described: dict[str, Any] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for file in files:
        labels = [*(chunk.label for chunk in file.chunks), *(key for key, _ in file.objects)]
        at = {part.name: _StorageInfo(file.name, part.offset, part.length) for part in written[file.name]}
        if list(at) != labels:
            raise RuntimeError(f"{folder / file.name} holds other entries than it was laid out for")
        for chunk in file.chunks:
            entry = described.setdefault(chunk.place.key, _tensor_metadata(chunk))
            assert isinstance(entry, TensorStorageMetadata)
            stored[MetadataIndex(chunk.place.key, chunk.offsets, len(entry.chunks))] = at[chunk.label]
            entry.chunks.append(_chunk_metadata(chunk))
        for key, _ in file.objects:
            described[key] = BytesStorageMetadata()
            stored[MetadataIndex(key)] = at[key]
    (folder / "metadata.json").write_text(json.dumps(CORE_METADATA), encoding="utf-8")
    (folder / METADATA_FILE).write_bytes(pickle.dumps(Metadata(described, storage_data=stored)))


def _tensor_metadata(chunk: Chunk) -> Any:
    import torch
    from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

    size = torch.Size(chunk.place.global_shape(chunk.item.shape))
    return TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), size, [])


def _chunk_metadata(chunk: Chunk) -> Any:
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
