"""Output that appears whole or not at all: written under temporary names, renamed at the end."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron.bridge.data.indexed import bin_path, idx_path
from megatron.bridge.data.sidecar import sidecar_path
from megatron.bridge.errors import BridgeError


@dataclass(frozen=True)
class StagedFiles:
    """Temporary paths to write to."""

    bin: Path
    idx: Path
    sidecar: Path


def check_output(prefix: str, overwrite: bool) -> None:
    """Refuse a prefix that cannot be written, or that exists when it may not be overwritten."""
    path = Path(prefix)
    if path.suffix in (".bin", ".idx", ".json"):
        raise BridgeError(f"--output {prefix!r} must be a prefix; leave {path.suffix!r} off, it is added")
    if path.is_dir() or prefix.endswith(os.sep) or not path.name:
        raise BridgeError(
            f"--output {prefix!r} must be a prefix, not a folder; add a name, e.g. {str(path / 'corpus')!r}"
        )
    taken = [target for target in _targets(prefix) if target.exists()]
    if taken and not overwrite:
        raise BridgeError(f"{str(taken[0])!r} exists; choose another --output, or replace it with --overwrite")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise BridgeError(f"--output {prefix!r} cannot be written: {str(parent)!r} is not a folder that can be written")


@contextmanager
def staged_output(prefix: str) -> Iterator[StagedFiles]:
    """Files beside `prefix` that take their names on success and vanish on any failure."""
    path = Path(prefix)
    created = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = StagedFiles(
        *(path.with_name(f".{path.name}.{os.getpid()}.{suffix}.partial") for suffix in ("bin", "idx", "json"))
    )
    try:
        yield staged
        _publish(prefix, staged)
    except BaseException:
        for partial in (staged.bin, staged.idx, staged.sidecar):
            partial.unlink(missing_ok=True)
        for folder in created:
            folder.rmdir()
        raise


def _publish(prefix: str, staged: StagedFiles) -> None:
    # The index goes first and comes last: without it there are no data, so a crash in between leaves nothing that
    # could be read as whole.
    idx_path(prefix).unlink(missing_ok=True)
    staged.bin.rename(bin_path(prefix))
    staged.sidecar.rename(sidecar_path(prefix))
    staged.idx.rename(idx_path(prefix))


def _targets(prefix: str) -> tuple[Path, Path, Path]:
    return bin_path(prefix), idx_path(prefix), sidecar_path(prefix)
