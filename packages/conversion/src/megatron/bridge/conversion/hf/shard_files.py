"""Safetensors files that are laid out first and then filled in any order, by one process or several."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch

from megatron.bridge.conversion.hf.errors import HFFolderError, listing
from megatron.bridge.conversion.hf.names import shard_name
from megatron.bridge.conversion.hf.safetensors_header import (
    CODE_BY_DTYPE,
    StoredTensor,
    encode_header,
    is_reserved,
)

type TensorSpec = tuple[Sequence[int], torch.dtype]

# An unfinished file has its final length: only its name says that it must not be loaded.
UNFINISHED = ".partial"

# Written at a time: the kernel takes several times longer to find room for larger pieces (seen on ext4, Linux 6.18).
PIECE_BYTES = 2**18


@dataclass(frozen=True)
class ShardLayout:
    """One shard: its final file name, its first bytes, and where each tensor lies in the data after them."""

    file: str
    header: bytes
    tensors: Mapping[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor.end - tensor.begin for tensor in self.tensors.values())


def lay_out(tensors: Mapping[str, TensorSpec], max_shard_bytes: float) -> tuple[ShardLayout, ...]:
    """Spread tensors over shards in the order given; one that is larger than `max_shard_bytes` has a shard of its own.

    Raises:
        HFFolderError: no tensors, a name or dtype that safetensors cannot hold, a shard size that is not positive.
    """
    if not tensors:
        raise HFFolderError("there are no tensors to write")
    if not max_shard_bytes > 0:
        raise HFFolderError(f"max_shard_bytes must be positive, not {max_shard_bytes!r}")
    faulty = [f"{name!r}: {dtype}" for name, (_, dtype) in tensors.items() if dtype not in CODE_BY_DTYPE]
    faulty += [f"{name!r}: the name is reserved" for name in tensors if is_reserved(name)]
    if faulty:
        raise HFFolderError(f"safetensors cannot hold these tensors:{listing(faulty)}\nconvert or rename them")
    groups: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    filled = 0
    for name, (shape, dtype) in tensors.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and filled + nbytes > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = (tuple(int(size) for size in shape), dtype)
        filled += nbytes
    return tuple(
        ShardLayout(shard_name(number, len(groups)), *encode_header(group))
        for number, group in enumerate(groups, start=1)
    )


class ShardFile:
    """One shard on disk, still under its unfinished name. Tensors go straight to their offsets, in any order."""

    def __init__(self, folder: Path, layout: ShardLayout) -> None:
        self.layout = layout
        self.path = folder / (layout.file + UNFINISHED)
        self._descriptor: int | None = None
        self._lock = Lock()

    def create(self) -> None:
        """Write the header and give the file its final length."""
        with self.path.open("xb") as file:
            file.write(self.layout.header)
            file.truncate(self.layout.nbytes)

    def check(self) -> None:
        """Refuse a file that another process laid out differently."""
        try:
            with self.path.open("rb") as file:
                same = file.read(len(self.layout.header)) == self.layout.header
        except OSError as error:
            raise HFFolderError(
                f"{self.path} cannot be read: {error.strerror}; every process must see the same disk and be given the "
                "same tensors and max_shard_bytes"
            ) from error
        if not same:
            raise HFFolderError(
                f"{self.path} was laid out for other tensors; give every process the same tensors, in the same order, "
                "and the same max_shard_bytes"
            )

    def write(self, name: str, tensor: torch.Tensor, first: int = 0) -> None:
        """Write a tensor of the shape and dtype laid out, or a part of it that begins at byte `first`."""
        stored = self.layout.tensors[name]
        if stored.end == stored.begin:
            return
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        remaining = memoryview(flat.view(torch.uint8).numpy())
        offset = len(self.layout.header) + stored.begin + first
        descriptor = self._open()
        while remaining:
            written = os.pwrite(descriptor, remaining[:PIECE_BYTES], offset)
            remaining, offset = remaining[written:], offset + written

    def sync(self) -> None:
        """Wait until what was written has reached the disk."""
        # Without the lock, which would stop the writers meanwhile: nobody closes a file while it is synced.
        descriptor = self._descriptor
        if descriptor is not None:
            os.fsync(descriptor)

    def close(self) -> None:
        """Close the file, if it was written to."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                os.close(descriptor)

    def sync_and_close(self) -> None:
        """`sync()`, then `close()`."""
        self.sync()
        self.close()

    def _open(self) -> int:
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY)
            return self._descriptor
