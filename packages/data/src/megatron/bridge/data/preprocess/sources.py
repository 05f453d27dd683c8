"""Which files are preprocessed, and the documents in them, in a fixed order and in bounded memory."""

import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from io import BufferedIOBase
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from megatron.bridge.data.arrow_files import ARROW_SUFFIXES, column, saved_dataset_files
from megatron.bridge.errors import BridgeError, did_you_mean

DEFAULT_GLOBS = ("**/*.txt", "**/*.jsonl", "**/*.jsonl.gz", "**/*.parquet")
_JSON_LINES = frozenset({".jsonl", ".ndjson"})
_BATCH_BYTES = 1 << 19
_BATCH_DOCUMENTS = 2048


class RawDocument(NamedTuple):
    """Undecoded bytes: a text, or one JSON value; where they came from; `line` is None for a whole file."""

    data: bytes
    file: str
    line: int | None
    is_json: bool

    @property
    def origin(self) -> str:
        """`file` or `file:line`, for messages."""
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass
class RawBatch:
    """Documents that are encoded together. `read_bytes`: how much of the source files they took."""

    documents: list[RawDocument] = field(default_factory=list)
    read_bytes: int = 0


def find_files(inputs: Sequence[str | Path], globs: Sequence[str] = ()) -> list[Path]:
    """The files to read: those given, and of each folder given those that match `globs`, sorted.

    Raises:
        BridgeError: nothing given, a path that is absent, not readable or given twice, a folder without a match.
    """
    if not inputs:
        raise BridgeError("no input: name text files, JSONL files or folders")
    folders = [Path(entry) for entry in inputs if Path(entry).is_dir()]
    if globs and not folders:
        raise BridgeError(f"--glob {globs[0]!r} selects files of a folder, but no folder is given")
    files: list[Path] = []
    for entry in map(Path, inputs):
        files += _files_of_folder(entry, globs) if entry.is_dir() else [_checked_file(entry)]
    twice = [path for path, count in Counter(path.resolve() for path in files).items() if count > 1]
    if twice:
        raise BridgeError(f"{str(twice[0])!r} is given twice; its text would count double")
    return files


def read_batches(files: Sequence[Path], document: str = "file", text_key: str = "text") -> Iterator[RawBatch]:
    """Documents of all files, in batches of about half a megabyte.

    Args:
        files: `.jsonl` or `.ndjson` hold one document per line, `.parquet` and `.arrow` one per row; any other file is
            text. `.gz` is unpacked.
        document: what a document of a text file is: the whole `file`, a `paragraph` (divided by blank lines) or a
            `line`.
        text_key: column of the text in `.parquet` and `.arrow`.
    """
    if document not in DOCUMENT_KINDS:
        raise BridgeError(
            f"document={document!r} is unknown{did_you_mean(document, DOCUMENT_KINDS)} "
            f"(known: {', '.join(DOCUMENT_KINDS)})"
        )
    batch, size = RawBatch(), 0
    for path in files:
        before = 0
        for raw, position in _rows(path, text_key) if _in_columns(path) else _read_file(path, document):
            batch.documents.append(raw)
            size += len(raw.data)
            if size >= _BATCH_BYTES or len(batch.documents) >= _BATCH_DOCUMENTS:
                batch.read_bytes += position - before
                yield batch
                batch, size, before = RawBatch(), 0, position
        batch.read_bytes += path.stat().st_size - before
    yield batch


def _in_columns(path: Path) -> bool:
    return path.suffix.lower() in ARROW_SUFFIXES


def _rows(path: Path, text_key: str) -> Iterator[tuple[RawDocument, int]]:
    """The texts of one column, each with the position on disk that the share of rows read comes to."""
    size = path.stat().st_size
    for number, (text, done) in enumerate(column(path, text_key), start=1):
        if not isinstance(text, str | None):
            raise BridgeError(
                f"{path}: the column {text_key!r} holds {type(text).__name__} (row {number}), not text; "
                "choose with --json-key"
            )
        yield RawDocument((text or "").encode(), str(path), number, is_json=False), int(done * size)


def _read_file(path: Path, document: str) -> Iterator[tuple[RawDocument, int]]:
    """Documents of one file, each with the position that reading has reached on disk."""
    is_json = _inner_suffix(path) in _JSON_LINES
    divide = _DIVISIONS["line" if is_json else document]
    try:
        with path.open("rb") as disk, _unpacked(path, disk) as stream:
            for data, line in divide(stream):
                yield RawDocument(data, str(path), line, is_json), disk.tell()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BridgeError(f"{path} is no whole gzip file: {error}; fetch or compress it again") from error
    except OSError as error:
        raise BridgeError(f"{path} cannot be read: {error.strerror or error}") from error


def _unpacked(path: Path, disk: BufferedIOBase) -> AbstractContextManager[BufferedIOBase]:
    # GzipFile leaves `disk` open when it is closed.
    return gzip.open(disk) if path.suffix.lower() == ".gz" else nullcontext(disk)


def _whole(stream: BufferedIOBase) -> Iterator[tuple[bytes, int | None]]:
    yield stream.read(), None


def _lines(stream: BufferedIOBase) -> Iterator[tuple[bytes, int | None]]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield line.rstrip(b"\r\n"), number


def _paragraphs(stream: BufferedIOBase) -> Iterator[tuple[bytes, int | None]]:
    gathered: list[bytes] = []
    first = 1
    for number, line in enumerate(chain(stream, [b""]), start=1):
        if line.strip():
            first = first if gathered else number
            gathered.append(line)
        elif gathered:
            yield b"".join(gathered).rstrip(b"\r\n"), first
            gathered = []


_DIVISIONS: Mapping[str, Callable[[BufferedIOBase], Iterator[tuple[bytes, int | None]]]] = {
    "file": _whole,
    "paragraph": _paragraphs,
    "line": _lines,
}
DOCUMENT_KINDS = tuple(_DIVISIONS)


def _inner_suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _checked_file(path: Path) -> Path:
    if not path.exists():
        near = did_you_mean(path.name, (entry.name for entry in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise BridgeError(f"the input {str(path)!r} does not exist{near}")
    if _inner_suffix(path) == ".json":
        raise BridgeError(
            f"{str(path)!r} could be one JSON value or one per line; when it has one object per line, name it .jsonl"
        )
    return path


def _files_of_folder(folder: Path, globs: Sequence[str]) -> list[Path]:
    if not globs and (saved := saved_dataset_files(folder)) is not None:
        return saved
    globs = globs or DEFAULT_GLOBS
    files: set[Path] = set()
    for pattern in globs:
        try:
            files.update(path for path in folder.glob(pattern) if path.is_file())
        except (ValueError, NotImplementedError) as error:
            raise BridgeError(f"--glob {pattern!r} is no relative pattern such as '**/*.txt': {error}") from error
    if not files:
        suffixes = Counter(path.suffix or "no suffix" for path in folder.rglob("*") if path.is_file())
        there = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(3)) or "no file at all"
        raise BridgeError(
            f"no file in {str(folder)!r} matches {' or '.join(globs)} (it holds {there}); choose with --glob '**/*.EXT'"
        )
    return sorted(files)
