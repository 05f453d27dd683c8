"""Rows of JSONL, JSON, Parquet and Hugging Face datasets on disk, one after another, in bounded memory."""

import gzip
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.data.arrow_files import saved_dataset_files, whole_rows
from megatron.bridge.data.instruction.messages import BadRow
from megatron.bridge.data.preprocess.sources import read_batches
from megatron.bridge.errors import BridgeError, did_you_mean

_CHUNK_CHARACTERS = 1 << 20
_EXCERPT = 40


@dataclass(frozen=True)
class SourceRow:
    """A row and where it stands; `problem` says why it could not be read, and `row` is then empty."""

    row: Mapping[str, Any]
    file: str
    number: int
    problem: str | None = None

    @property
    def origin(self) -> str:
        """`file:number`: the line of JSONL, the place (from 1 on) elsewhere."""
        return f"{self.file}:{self.number}"

    def checked(self) -> Mapping[str, Any]:
        """The row.

        Raises:
            BadRow: it could not be read.
        """
        if self.problem is not None:
            raise BadRow(self.problem)
        return self.row


def find_row_files(paths: Sequence[str | Path], field: str = "dataset.data_paths") -> list[Path]:
    """The files behind `paths`, in order: files themselves, datasets on disk, and the data files of other folders.

    Raises:
        BridgeError: a path is absent, of an unknown kind, or a folder without data.
    """
    if isinstance(paths, str):
        raise BridgeError(f"{field}={paths!r} must be a list, e.g. [{paths!r}]")
    if not paths:
        raise BridgeError(f"{field} is empty; name at least one file of rows")
    return [file for path in paths for file in _files_at(Path(path), field)]


def read_rows(files: Sequence[Path]) -> Iterator[SourceRow]:
    """Every row of every file. A line that is no JSON object comes as a row with a `problem`.

    Raises:
        BridgeError: a file cannot be read at all.
    """
    for file in files:
        yield from _reader(file)(file)


def _files_at(path: Path, field: str) -> list[Path]:
    if path.is_dir():
        return _files_of_folder(path, field)
    if not path.exists():
        near = did_you_mean(path.name, (entry.name for entry in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise BridgeError(f"{field} names {str(path)!r}, which does not exist{near}")
    if _suffix(path) not in _READERS:
        raise BridgeError(
            f"{field} names {str(path)!r}; rows are read from {', '.join(_READERS)}, or a dataset on disk"
        )
    return [path]


def _files_of_folder(folder: Path, field: str) -> list[Path]:
    if (saved := saved_dataset_files(folder)) is not None:
        return saved
    files = sorted(path for path in folder.iterdir() if path.is_file() and _suffix(path) in _READERS)
    if not files:
        raise BridgeError(f"{field} names the folder {str(folder)!r}, which holds no {', '.join(_READERS)} file")
    return files


def _suffix(path: Path) -> str:
    packed = path.suffix.lower() == ".gz"
    return (path.with_suffix("") if packed else path).suffix.lower()


def _reader(file: Path) -> Callable[[Path], Iterator[SourceRow]]:
    return _READERS[_suffix(file)]


def _json_lines(file: Path) -> Iterator[SourceRow]:
    for batch in read_batches([file]):
        for raw in batch.documents:
            row, problem = _parsed(raw.data)
            yield SourceRow(row, raw.file, raw.line or 0, problem)


def _parsed(data: bytes) -> tuple[Mapping[str, Any], str | None]:
    try:
        return _object(json.loads(data))
    except (ValueError, RecursionError) as error:
        text = data[:_EXCERPT].decode("utf-8", "replace")
        return {}, f"not JSON: {error}; it starts with {text!r}. Repair or remove the line"


def _object(value: Any) -> tuple[Mapping[str, Any], str | None]:
    return (value, None) if isinstance(value, dict) else ({}, f"no object but {type(value).__name__}")


def _json_array(file: Path) -> Iterator[SourceRow]:
    """The elements of one JSON array, decoded one by one."""
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as stream:
            for number, value in enumerate(_elements(stream.read, str(file)), start=1):
                row, problem = _object(value)
                yield SourceRow(row, str(file), number, problem)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BridgeError(f"{file} cannot be read: {error}") from error


def _elements(read: Callable[[int], str], name: str) -> Iterator[Any]:
    text, decoder = read(_CHUNK_CHARACTERS).lstrip("\ufeff \t\r\n"), json.JSONDecoder()
    if not text.startswith("["):
        raise BridgeError(f"{name} is no JSON array of rows; when it has one object per line, name it .jsonl")
    text = text[1:]
    for count in itertools.count(1):
        text = text.lstrip(" \t\r\n")
        while True:
            try:
                if text.startswith("]"):
                    return
                value, end = decoder.raw_decode(text)
                rest = text[end:].lstrip(" \t\r\n")
                if rest[:1] in (",", "]") and rest[:1]:
                    break
                problem: object = "',' or ']' expected"
            except ValueError as error:
                problem = error
            more = read(max(_CHUNK_CHARACTERS, len(text)))
            if not more:
                raise BridgeError(f"{name}: row {count} is not JSON, or the array does not end: {problem}")
            text = (text + more).lstrip(" \t\r\n")
        yield value
        text = rest[1:] if rest[0] == "," else rest


def _columns(file: Path) -> Iterator[SourceRow]:
    for number, row in enumerate(whole_rows(file), start=1):
        yield SourceRow(_without_nulls(row), str(file), number)


def _without_nulls(value: Any) -> Any:
    """Columns have one type, so that fields which a message never had come as nulls; JSON would not have them."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


_READERS: Mapping[str, Callable[[Path], Iterator[SourceRow]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".parquet": _columns,
    ".arrow": _columns,
}
