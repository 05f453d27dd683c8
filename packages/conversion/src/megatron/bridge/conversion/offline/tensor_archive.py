"""Single tensors in `torch.save`'s format, written and read without passing through copies in memory.

The format is a zip archive of stored (not compressed) records with a checksum each: a pickle that says what the tensor
looks like, and its bytes. torch itself copies a tensor several times on the way, and compares no checksum.
"""

import io
import mmap
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from zlib_ng.zlib_ng import crc32

if TYPE_CHECKING:
    import torch

# Records, which stand in a folder named after nothing in particular.
_FOLDER = "archive/"
_PICKLE, _BYTES, _BYTE_ORDER, _VERSION = "data.pkl", "data/0", "byteorder", "version"
_REBUILD = ("torch._utils", "_rebuild_tensor_v2")
# Longest tensor whose record a plain zip header can describe.
_LARGEST = 2**32 - 2**20
_LOCAL_HEADER_BYTES = 30


class _Storage(NamedTuple):
    """What a pickle says of a tensor's bytes: dtype, record and number of elements."""

    dtype: "torch.dtype"
    record: str
    numel: int


def write_tensor(stream: IO[bytes], tensor: "torch.Tensor") -> None:
    """Write what `torch.save` would. `tensor` is contiguous and on the CPU; the stream need not be seekable."""
    import torch

    if tensor.dtype not in _storage_names() or tensor.nbytes > _LARGEST:
        torch.save(tensor.clone(), stream)
        return
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        # By `ZipInfo`, which holds no time: the same tensor gives the same bytes.
        archive.writestr(zipfile.ZipInfo(_FOLDER + _PICKLE), _described(tensor))
        archive.writestr(zipfile.ZipInfo(_FOLDER + _BYTE_ORDER), "little")
        with archive.open(zipfile.ZipInfo(_FOLDER + _BYTES), "w") as record:
            if tensor.nbytes:
                record.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        archive.writestr(zipfile.ZipInfo(_FOLDER + _VERSION), "3\n")


def _storage_names() -> "dict[torch.dtype, str]":
    from torch.storage import _dtype_to_storage_type_map

    return _dtype_to_storage_type_map()


class _Described:
    """Pickled as a call of torch's function that makes a tensor of a storage."""

    def __init__(self, tensor: "torch.Tensor") -> None:
        self._storage = _Storage(tensor.dtype, "0", tensor.numel())
        self._shape, self._stride = tuple(tensor.shape), tuple(tensor.stride())

    def __reduce__(self) -> Any:
        from torch._utils import _rebuild_tensor_v2

        return _rebuild_tensor_v2, (self._storage, 0, self._shape, self._stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        import torch

        if not isinstance(value, _Storage):
            return None
        return "storage", getattr(torch, _storage_names()[value.dtype]), value.record, "cpu", value.numel


def _described(tensor: "torch.Tensor") -> bytes:
    text = io.BytesIO()
    _Pickler(text, protocol=2).dump(_Described(tensor))
    return text.getvalue()


def read_tensor(path: Path, offset: int, length: int) -> Any:
    """What `torch.save` wrote to a run of a file's bytes, its checksums compared.

    A tensor is a view of a private mapping of the file, which goes with it: writing to it leaves the file alone.

    Raises:
        ValueError: a checksum is wrong.
        Exception: whatever zipfile, pickle and torch raise on bytes that are no such archive.
    """
    mapped = _mapped(path, offset, length)
    with zipfile.ZipFile(cast("IO[bytes]", _Bytes(mapped))) as archive:
        records = dict(_records(archive, mapped))
    if bytes(records.get(_BYTE_ORDER, b"little")) == b"little":
        try:
            return _Unpickler(records).load()
        except _NotPlainError:
            pass
    import torch

    return torch.load(cast("IO[bytes]", _Bytes(mapped)), map_location="cpu", weights_only=True)


def _mapped(path: Path, offset: int, length: int) -> memoryview:
    """The bytes, in memory when they are looked at; the mapping lives as long as something refers to it."""
    before = offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < offset + length:
            raise ValueError(f"the file ends before byte {offset + length}")
        mapping = mmap.mmap(file.fileno(), length + before, access=mmap.ACCESS_COPY, offset=offset - before)
    mapping.madvise(mmap.MADV_SEQUENTIAL)
    return memoryview(mapping)[before:]


def _records(archive: zipfile.ZipFile, mapped: memoryview) -> Iterator[tuple[str, memoryview]]:
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its record {entry.filename} is compressed")
        local = bytes(mapped[entry.header_offset : entry.header_offset + _LOCAL_HEADER_BYTES])
        lengths = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
        begin = entry.header_offset + _LOCAL_HEADER_BYTES + sum(lengths)
        record = mapped[begin : begin + entry.file_size]
        if len(record) != entry.file_size or crc32(record) != entry.CRC:
            raise ValueError(f"the checksum of {entry.filename} is wrong")
        yield entry.filename.partition("/")[2], record


class _NotPlainError(Exception):
    """The pickle holds something else than one ordinary tensor."""


class _Unpickler(pickle.Unpickler):
    """Rebuilds a tensor over the bytes of its record; knows no other class or function."""

    def __init__(self, records: dict[str, memoryview]) -> None:
        super().__init__(io.BytesIO(records[_PICKLE]))
        self._records = records
        self._dtypes = {name: dtype for dtype, name in _storage_names().items()}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == _REBUILD:
            # Not a method, which the unpickler would remember: the cycle would keep the mapping until it is collected.
            return partial(_rebuilt, self._records)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in self._dtypes:
            return self._dtypes[name]
        raise _NotPlainError(f"{module}.{name}")

    def persistent_load(self, reference: Any) -> _Storage:
        _, dtype, record, _, numel = reference
        return _Storage(dtype, record, numel)


def _rebuilt(
    records: dict[str, memoryview], storage: _Storage, offset: int, shape: Any, stride: Any, *_: Any
) -> "torch.Tensor":
    import torch

    record = records[f"data/{storage.record}"]
    if len(record) != storage.numel * storage.dtype.itemsize:
        raise ValueError(f"its record {storage.record} has {len(record)} bytes for {storage.numel} elements")
    if not len(record):
        return torch.empty(shape, dtype=storage.dtype)
    return torch.frombuffer(record, dtype=storage.dtype).as_strided(shape, stride, offset)


class _Bytes(io.RawIOBase):
    """Bytes in memory as a stream, without copying all of them as `io.BytesIO` would."""

    def __init__(self, content: memoryview) -> None:
        super().__init__()
        self._content, self._at = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._content)}[whence]
        if base + offset < 0:
            raise OSError(f"seek to {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        piece = self._content[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)
