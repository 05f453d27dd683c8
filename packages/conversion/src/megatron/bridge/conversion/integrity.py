"""Digests of a checkpoint's files: a wrong bit in any of them is found before anything is loaded.

The manifest is Megatron-Core's own (`integrity.json`, SHA-256): `dist_checkpointing.load(..., verify_integrity=True)`
understands it. There rank 0 hashes all files one after another; here each rank hashes what it wrote or its share.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from megatron.bridge.conversion.checkpoint_layout import CheckpointError, resolve

MANIFEST = "integrity.json"
_ALGORITHM = "sha256"


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Name -> SHA-256 of a file in `folder`, in hexadecimal."""
    return {name: _digest(folder / name) for name in names}


def files_of_rank(folder: Path, rank: int) -> list[str]:
    """The files of tensors that `rank` has written."""
    return [file.name for file in folder.glob(f"__{rank}_*.distcp")]


def other_files(folder: Path, known: Collection[str]) -> list[str]:
    """All files in `folder` and its sub-folders but the manifest and those that are `known`."""
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in files if name != MANIFEST and name not in known)


def write_manifest(folder: Path, digests: Mapping[str, str]) -> None:
    """Record the digests in `folder`."""
    content = {"algorithm": _ALGORITHM, "files": dict(sorted(digests.items()))}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2))


def recorded_digests(folder: Path) -> dict[str, str]:
    """Name -> recorded digest; empty for a checkpoint that records none.

    Raises:
        CheckpointError: the manifest is damaged, or uses another algorithm.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return {}
    try:
        content = json.loads(manifest.read_bytes())
        algorithm, files = content["algorithm"], dict(content["files"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{manifest} cannot be read ({error}); take another checkpoint") from error
    if algorithm != _ALGORITHM:
        raise CheckpointError(f"{manifest} holds digests by {algorithm!r}; {_ALGORITHM!r} is known here")
    return files


def wrong_files(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the `part`-th of `parts` equal shares of the recorded files, file by file.

    Raises:
        CheckpointError: see `recorded_digests`.
    """
    recorded = recorded_digests(folder)
    # By size, so that the shares are about equal.
    sizes = {name: _size(folder / name) for name in recorded}
    mine = sorted(sizes, key=lambda name: (-sizes[name], name))[part::parts]
    return [problem for name in mine if (problem := _problem(folder / name, name, recorded[name]))]


def refuse_changed(path: Path) -> int:
    """Refuse a checkpoint whose files are not those that were written; returns how many were compared.

    Raises:
        CheckpointError: no checkpoint, one that records no digests, or one that has changed; each file is named.
    """
    folder = resolve(path)
    recorded = recorded_digests(folder)
    if not recorded:
        raise CheckpointError(f"{folder} records no digests: there is no {MANIFEST} in it")
    if wrong := wrong_files(folder):
        raise CheckpointError(f"checkpoint {folder} is damaged: {'; '.join(wrong)}; take another checkpoint")
    return len(recorded)


def _problem(file: Path, name: str, recorded: str) -> str | None:
    if not file.is_file():
        return f"{name} is missing"
    try:
        found = _digest(file)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None if found == recorded else f"{name} has changed since it was written (its SHA-256 differs)"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, _ALGORITHM).hexdigest()


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
