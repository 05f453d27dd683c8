"""Parquet files, and the Arrow files of Hugging Face datasets on disk (`Dataset.save_to_disk`), without `datasets`."""

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.bridge.errors import BridgeError, did_you_mean

_ROWS = 1024  # read at a time
_STATE, _SPLITS = "state.json", "dataset_dict.json"


def saved_dataset_files(folder: Path) -> list[Path] | None:
    """The Arrow files of a dataset on disk, in its order; None for a folder that is none.

    Raises:
        BridgeError: the folder holds several splits, or lacks a file.
    """
    if (folder / _SPLITS).is_file():
        splits = sorted(str(entry) for entry in folder.iterdir() if entry.is_dir())
        raise BridgeError(f"{str(folder)!r} holds a dataset's splits; name one of them: {', '.join(splits)}")
    if not (folder / _STATE).is_file():
        return None
    try:
        files = [
            folder / entry["filename"] for entry in json.loads((folder / _STATE).read_text("utf-8"))["_data_files"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise BridgeError(
            f"{folder / _STATE} is not that of a Hugging Face dataset: {error!r}; save it again"
        ) from error
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise BridgeError(f"{str(missing[0])!r} of the dataset {str(folder)!r} is missing; save or fetch it again")
    return files


class SavedRows(Sequence[dict[str, Any]]):
    """The rows of a dataset on disk by number. Its files are mapped: of a row the wanted columns are read, no more.

    Args:
        folder: of the dataset.
        columns: wanted of each row.

    Raises:
        BridgeError: pyarrow is absent, the folder is no dataset on disk, a file cannot be read, or has no such column.
    """

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        files = saved_dataset_files(folder)
        if not files:
            raise BridgeError(
                f"{str(folder)!r} is no Hugging Face dataset on disk; write one with Dataset.save_to_disk"
            )
        _refuse_without_pyarrow(files[0])
        import pyarrow

        tables = []
        for file in files:
            with _readable(file), pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))) as stream:
                for name in columns:
                    _check(file, name, stream.schema.names, remedy="name another one")
                tables.append(stream.read_all().select(list(columns)))
        self._table = pyarrow.concat_tables(tables)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._table.slice(index, 1).to_pylist()[0]


def column(file: Path, name: str) -> Iterator[tuple[Any, float]]:
    """The values of one column, with the share of the file's rows that has been read. Other columns are not.

    Raises:
        BridgeError: pyarrow is absent, the file cannot be read, or has no such column.
    """
    with _opened(file, name) as (rows, batches):
        done = 0
        for batch in batches:
            done += batch.num_rows
            for value in batch.column(name).to_pylist():
                yield value, done / rows


def whole_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Every row, with all columns.

    Raises:
        BridgeError: pyarrow is absent, or the file cannot be read.
    """
    with _opened(file, None) as (_, batches):
        for batch in batches:
            yield from batch.to_pylist()


def _refuse_without_pyarrow(file: Path) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise BridgeError(f"{file} needs the package pyarrow: uv pip install 'megatron-bridge-data[arrow]'")


@contextmanager
def _opened(file: Path, name: str | None) -> Iterator[tuple[int, Iterator[Any]]]:
    """Number of rows, and batches of them, of one column or of all."""
    _refuse_without_pyarrow(file)
    with _readable(file), _OPENERS[file.suffix.lower()](file, name) as found:
        yield found


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Within the block, what pyarrow says of a broken file is said of this one."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise BridgeError(f"{file} cannot be read as {file.suffix[1:].title()}: {error}") from error


@contextmanager
def _parquet(file: Path, name: str | None) -> Iterator[tuple[int, Iterator[Any]]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        _check(file, name, table.schema_arrow.names)
        yield table.metadata.num_rows, table.iter_batches(_ROWS, columns=None if name is None else [name])


@contextmanager
def _arrow(file: Path, name: str | None) -> Iterator[tuple[int, Iterator[Any]]]:
    import pyarrow

    # Mapped, not read: what other columns hold is never touched.
    with pyarrow.memory_map(str(file)) as memory, pyarrow.ipc.open_stream(memory) as stream:
        _check(file, name, stream.schema.names)
        batches = list(stream)
        yield sum(batch.num_rows for batch in batches), _slices(batches)


def _slices(batches: list[Any]) -> Iterator[Any]:
    for batch in batches:
        yield from (batch.slice(start, _ROWS) for start in range(0, batch.num_rows, _ROWS))


def _check(file: Path, name: str | None, names: list[str], remedy: str = "choose with --json-key") -> None:
    if name is not None and name not in names:
        near = did_you_mean(name, names)
        raise BridgeError(f"{file} has no column {name!r}{near} (it has: {', '.join(map(repr, names))}); {remedy}")


_OPENERS: Mapping[str, Callable[[Path, str | None], Any]] = {".parquet": _parquet, ".arrow": _arrow}
ARROW_SUFFIXES = frozenset(_OPENERS)
