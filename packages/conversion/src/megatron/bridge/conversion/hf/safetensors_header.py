"""The header of one safetensors file: 8 bytes of length (little endian), JSON, then the tensors' bytes without gaps.

Read here rather than by the safetensors library because that one parses a header anew for each handle, tells no file
size and names neither file nor tensor when it refuses; and it cannot write a header before it has every tensor.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from megatron.bridge.conversion.hf.errors import HFFolderError

# The codes of the safetensors format that stand for one torch dtype with whole bytes per element.
DTYPE_BY_CODE: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODE_BY_DTYPE: Mapping[torch.dtype, str] = {dtype: code for code, dtype in DTYPE_BY_CODE.items()}
_ITEMSIZE = {code: dtype.itemsize for code, dtype in DTYPE_BY_CODE.items()}

LENGTH_BYTES = 8
# The library's own limit; a longer header is a damaged length.
_MAX_HEADER_BYTES = 100_000_000
_ALIGNMENT = 8
_METADATA = "__metadata__"


class StoredTensor(NamedTuple):
    """One tensor of a file; `begin` and `end` count bytes from the start of the data that follows the header."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    end: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, read without touching their bytes.

    Raises:
        HFFolderError: the header is damaged, the offsets leave gaps or overlap, or the file is longer or shorter than
            the header says; the message names the file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise _damaged(path, f"it has {size} bytes, too few for its header of {length} bytes")
            text = file.read(length)
    except OSError as error:
        raise HFFolderError(f"{path} cannot be read: {error.strerror}") from error
    entries = _entries(path, text)
    stored = {name: _stored(path, name, entry) for name, entry in entries.items() if name != _METADATA}
    _check_extent(path, stored, size - LENGTH_BYTES - length)
    return stored


def encode_header(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> tuple[bytes, dict[str, StoredTensor]]:
    """The first bytes of a file that holds `tensors`, and where each lies.

    Wider dtypes come first, so that every tensor is aligned to its item size.
    """
    stored: dict[str, StoredTensor] = {}
    end = 0
    for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: -item[1][1].itemsize):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        stored[name] = StoredTensor(shape, dtype, begin, end)
    # transformers refuses a file that does not say which framework wrote it.
    entries: dict[str, object] = {_METADATA: {"format": "pt"}}
    for name, tensor in stored.items():
        offsets = [tensor.begin, tensor.end]
        entries[name] = {"dtype": CODE_BY_DTYPE[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, stored


def is_reserved(name: str) -> bool:
    """Whether the format uses the name for something else than a tensor."""
    return name == _METADATA


def _damaged(path: Path, reason: str) -> HFFolderError:
    return HFFolderError(f"{path} is damaged: {reason}; fetch or write the file again")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _entries(path: Path, text: bytes) -> dict[str, object]:
    try:
        entries = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is not a table of tensors")
    return entries


def _stored(path: Path, name: str, entry: object) -> StoredTensor:
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
        nbytes = math.prod(shape) * _ITEMSIZE[code] if code in _ITEMSIZE else None
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError("a size is not a whole number")
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its header entry for {name!r} is {entry!r}") from error
    if nbytes is None:
        raise HFFolderError(
            f"{path} holds {name!r} with dtype {code!r}, which is not one of {', '.join(DTYPE_BY_CODE)}; "
            "convert the checkpoint to one of these"
        )
    if end - begin != nbytes:
        raise _damaged(path, f"{name!r} ({code}, shape {shape}) needs {nbytes} bytes, its header gives {end - begin}")
    return StoredTensor(tuple(shape), DTYPE_BY_CODE[code], begin, end)


def _check_extent(path: Path, stored: Mapping[str, StoredTensor], available: int) -> None:
    expected = 0
    for name, tensor in sorted(stored.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != expected:
            raise _damaged(path, f"{name!r} begins at byte {tensor.begin} of the data where {expected} was expected")
        expected = tensor.end
    if expected != available:
        what = "is truncated" if available < expected else "has bytes that no tensor owns"
        raise HFFolderError(
            f"{path} {what}: its header describes {expected} bytes of tensors, {available} follow it; "
            "fetch or write the file again"
        )
