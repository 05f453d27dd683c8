"""Megatron-Core's `.bin`/`.idx` format: a writer and a reader of the index, with numpy alone.

Megatron-Core has a builder of its own, but importing it costs ten seconds; the tests hold the files of this one to be
the same, byte for byte. Layout of the `.idx`: magic, version (u64), dtype code (u8), number of sequences (u64), number
of document boundaries (u64), lengths (i32 each), byte offsets (i64 each), boundaries (i64 each, from 0). The `.bin` is
the ids one after another. Here every document is one sequence.
"""

import os
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from megatron.bridge.errors import BridgeError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
# Megatron-Core keeps a margin below 2**16.
_UINT16_VOCABULARY = 65500
_SCAN_IDS = 1 << 24

type TokenDtype = type[np.uint16 | np.int32]


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """`PREFIX.bin`, which holds the ids."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """`PREFIX.idx`, which says where each document lies."""
    return Path(f"{os.fspath(prefix)}.idx")


def token_dtype(vocab_size: int) -> TokenDtype:
    """The narrowest type that Megatron-Core uses for ids of a vocabulary: uint16 or int32."""
    return np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32


class IndexedDatasetWriter:
    """Writes documents to a `.bin` and, when closed without an error, its `.idx`.

    Memory: 4 bytes per document until closed, 20 while closing.

    Args:
        bin_file, idx_file: paths to write; the caller chooses temporary ones.
        dtype: type of the ids.
    """

    def __init__(self, bin_file: Path, idx_file: Path, dtype: TokenDtype) -> None:
        self._idx_file = idx_file
        self._dtype = dtype
        self._lengths = array("i")
        self._data: IO[bytes] = bin_file.open("wb")

    def add_documents(self, ids: bytes, lengths: array[int]) -> None:
        """Append documents: their ids as the bytes of `dtype`, and the number of ids of each."""
        assert sum(lengths) * np.dtype(self._dtype).itemsize == len(ids)
        self._data.write(ids)
        self._lengths.extend(lengths)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._data:
            if kind is None:
                self._write_index()
                self._data.flush()
                os.fsync(self._data.fileno())

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.empty(0, np.int32)
        offsets = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1], out=offsets[1:], dtype=np.int64)
        offsets *= np.dtype(self._dtype).itemsize
        code = next(code for code, dtype in _CODES.items() if dtype is self._dtype)
        with self._idx_file.open("wb") as index:
            index.write(_HEADER.pack(_MAGIC, _VERSION, code, len(lengths), len(lengths) + 1))
            index.write(lengths.tobytes())
            index.write(offsets.tobytes())
            index.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
            index.flush()
            os.fsync(index.fileno())


@dataclass(frozen=True)
class IndexedCorpus:
    """A `.bin`/`.idx` pair that has been found whole.

    Attributes:
        prefix: path without the suffix.
        dtype: type of the ids.
        lengths: ids per sequence, int32, mapped from the file.
    """

    prefix: str
    dtype: type[np.generic]
    lengths: np.ndarray[Any, np.dtype[np.int32]]

    @property
    def tokens(self) -> int:
        """Number of ids in the `.bin`."""
        return int(self.lengths.sum(dtype=np.int64))

    def tokens_between(self, first: int, end: int) -> int:
        """Number of ids of the sequences `first` to `end - 1`."""
        return int(self.lengths[first:end].sum(dtype=np.int64))

    def max_token_id(self) -> int:
        """The largest id, by reading the whole `.bin` (1 to 2 GB/s); -1 when there is none."""
        ids = np.memmap(bin_path(self.prefix), dtype=self.dtype, mode="r")
        return max((int(ids[at : at + _SCAN_IDS].max()) for at in range(0, len(ids), _SCAN_IDS)), default=-1)


def open_corpus(prefix: str) -> IndexedCorpus:
    """Read the index of `PREFIX.bin`/`PREFIX.idx` and prove that both files are whole.

    Raises:
        BridgeError: a file is missing, is not of this format, or is shorter than the index says.
    """
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            raise BridgeError(_missing(prefix, path))
    index = idx_path(prefix)
    size = index.stat().st_size
    with index.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise BridgeError(f"{index} is no Megatron-Core index file (wrong first bytes); {_remake(prefix)}")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != _VERSION or code not in _CODES:
        raise BridgeError(f"{index} has version {version} and type code {code}, which are unknown; {_remake(prefix)}")
    needed = _HEADER.size + 12 * sequences + 8 * boundaries
    if size < needed:
        raise BridgeError(f"{index} is cut short: {size} of {needed} bytes; {_remake(prefix)}")
    lengths = np.memmap(index, dtype=np.int32, mode="r", offset=_HEADER.size, shape=(sequences,)) if sequences else None
    corpus = IndexedCorpus(prefix, _CODES[code], np.empty(0, np.int32) if lengths is None else lengths)
    _check_data(corpus)
    return corpus


def _check_data(corpus: IndexedCorpus) -> None:
    path = bin_path(corpus.prefix)
    needed = corpus.tokens * np.dtype(corpus.dtype).itemsize
    if path.stat().st_size != needed:
        raise BridgeError(
            f"{path} has {path.stat().st_size} bytes where its index says {needed}: "
            f"the two files do not belong together or one is cut short; {_remake(corpus.prefix)}"
        )


def _missing(prefix: str, path: Path) -> str:
    if not path.parent.is_dir():
        return f"no data at {prefix!r}: the folder {str(path.parent)!r} does not exist; {_remake(prefix)}"
    if Path(prefix).is_dir() or Path(prefix).suffix in (".bin", ".idx"):
        folder = Path(prefix) if Path(prefix).is_dir() else path.parent
        found = sorted(str(found.with_suffix("")) for found in folder.glob("*.idx"))
        listed = f"; prefixes there: {', '.join(found[:5])}" if found else f"; {_remake(prefix)}"
        return f"{prefix!r} is not a prefix (the common path of a .bin and an .idx without the suffix){listed}"
    return f"no data at {prefix!r}: {path.name!r} does not exist in {str(path.parent)!r}; {_remake(prefix)}"


def _remake(prefix: str) -> str:
    return f"make it with `megatron-bridge data preprocess INPUT --tokenizer FOLDER --output {prefix}`"
