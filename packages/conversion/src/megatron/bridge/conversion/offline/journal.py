"""The record of an unfinished conversion: which files are done, and how to see that they still are.

It lies beside the partial folder. Each line is one finished file, appended after the file has reached the disk.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from zlib_ng.zlib_ng import crc32

from megatron.bridge.errors import BridgeError

_READ_BYTES = 2**22


class Part(NamedTuple):
    """A run of bytes of a file and its CRC-32. Parts cover all that was converted."""

    name: str
    offset: int
    length: int
    crc: int


class Journal:
    """Finished files of one job. One process at a time holds it.

    Args:
        path: the journal's file.
        job: everything that decides the result; a journal of another job is not continued.

    Raises:
        BridgeError: another process works on the same target.
    """

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        self.path = path
        self._job = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()
        self._lock = Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise BridgeError(f"another process is converting to the same place ({path} is locked)") from error
        self._files = self._read()
        self.continues = self._files is not None
        if self._files is None:
            self._restart()

    def _read(self) -> dict[str, list[Part]] | None:
        """The finished files, or None when this is not this job's journal."""
        self._file.seek(0)
        lines = self._file.read().split("\n")
        entries = []
        # What follows the last line break was cut off while it was written.
        for line in lines[:-1]:
            try:
                entries.append(json.loads(line))
            except ValueError:
                return None
        if not entries or entries[0] != {"job": self._job}:
            return None
        self._file.truncate(sum(len(line.encode()) + 1 for line in lines[:-1]))
        return {entry["file"]: [Part(*part) for part in entry["parts"]] for entry in entries[1:]}

    def _restart(self) -> None:
        self._file.truncate(0)
        self._files = {}
        self._append({"job": self._job})

    def finished(self, folder: Path, file: str) -> list[Part] | None:
        """The parts of a finished file, read again and compared; None when it must be written (again)."""
        parts = (self._files or {}).get(file)
        return parts if parts is not None and _intact(folder / file, parts) else None

    def add(self, file: str, parts: list[Part]) -> None:
        """Note that a file is finished and on disk. Any thread."""
        with self._lock:
            self._append({"file": file, "parts": parts})

    def close(self) -> None:
        """Let go of the journal; it stays for the next attempt."""
        self._file.close()

    def remove(self) -> None:
        """The job is done."""
        self.path.unlink(missing_ok=True)
        self._file.close()

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _intact(path: Path, parts: list[Part]) -> bool:
    try:
        with path.open("rb") as file:
            return all(_crc(file, part) == part.crc for part in parts)
    except OSError:
        return False


def _crc(file: Any, part: Part) -> int | None:
    file.seek(part.offset)
    crc, remaining = 0, part.length
    while remaining:
        data = file.read(min(remaining, _READ_BYTES))
        if not data:
            return None
        crc, remaining = crc32(data, crc), remaining - len(data)
    return crc


def state_of(files: "list[Path]") -> list[tuple[str, int, int]]:
    """Name, size and time of change of files: what says that a source is still the same."""
    return [(path.name, (state := path.stat()).st_size, state.st_mtime_ns) for path in files]
