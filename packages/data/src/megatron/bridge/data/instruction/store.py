"""Encoded conversations on disk: written once, read by every rank at any index through memory maps."""

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.bridge.data.instruction.encoding import Encoded
from megatron.bridge.data.instruction.prepare import Counts, Sample
from megatron.bridge.errors import BridgeError

_RECORD = "store.json"
_FORMAT = 1


class EncodedStore:
    """The samples in a folder.

    Attributes:
        lengths: tokens of each sample, `[samples]`.
        pieces: which piece (row or tree) each came from, ascending, `[samples]`.
        counts: what became of the rows.
    """

    def __init__(self, folder: Path) -> None:
        record = _record(folder)
        self.counts = Counts(**record["counts"])
        ends = np.load(folder / "ends.npy", mmap_mode="r")
        self._starts: NDArray[np.int64] = np.concatenate(([0], ends))
        self.lengths: NDArray[np.int64] = np.diff(self._starts)
        self.pieces: NDArray[np.int64] = np.load(folder / "pieces.npy")
        tokens = int(self._starts[-1])
        self._ids = np.memmap(folder / "ids.bin", np.int32, "r", shape=(tokens,))
        self._trained = np.memmap(folder / "trained.bin", np.bool_, "r", shape=(tokens,))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Encoded:
        start, stop = self._starts[index], self._starts[index + 1]
        return Encoded(self._ids[start:stop], self._trained[start:stop])


def holds_store(folder: Path) -> bool:
    """Whether a finished store is there."""
    return (folder / _RECORD).is_file()


def write_store(folder: Path, samples: Iterable[Sample], counts: Counts) -> None:
    """Write a folder that appears whole or not at all; `counts` are read when all samples are written.

    Raises:
        BridgeError: there are no samples, or the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise BridgeError(
            f"encoded rows cannot be written to {str(folder.parent)!r}: {error.strerror}; "
            "set dataset.path_to_cache to a folder that can be written"
        ) from error
    try:
        _write(staging, samples, counts)
        _publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, folder: Path) -> None:
    try:
        staging.rename(folder)
    except OSError:  # another run was faster: what it wrote is the same
        if not holds_store(folder):
            raise


def _write(staging: Path, samples: Iterable[Sample], counts: Counts) -> None:
    lengths, pieces = [], []
    with (staging / "ids.bin").open("wb") as ids, (staging / "trained.bin").open("wb") as trained:
        for sample in samples:
            ids.write(sample.encoded.ids.astype(np.int32).tobytes())
            trained.write(sample.encoded.trained.astype(np.bool_).tobytes())
            lengths.append(len(sample.encoded.ids))
            pieces.append(sample.piece)
    if not lengths:
        raise BridgeError(
            f"no row can be trained: {counts.rows} were read, {len(counts.bad)} skipped as bad, {counts.dropped} "
            "dropped as too long; look at them with `megatron-bridge data inspect`"
        )
    np.save(staging / "ends.npy", np.fromiter(itertools.accumulate(lengths), np.int64))
    np.save(staging / "pieces.npy", np.asarray(pieces, np.int64))
    (staging / _RECORD).write_text(json.dumps({"format": _FORMAT, "counts": asdict(counts)}, indent=2) + "\n", "utf-8")


def _record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / _RECORD).read_text("utf-8"))
        if record["format"] == _FORMAT:
            return record
        problem = f"is of format {record['format']!r}, this version reads {_FORMAT}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"cannot be read: {error!r}"
    raise BridgeError(f"{folder / _RECORD} {problem}; remove the folder, it is made again")
