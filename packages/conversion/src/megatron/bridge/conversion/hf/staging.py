"""A folder that appears under its name whole or not at all: it is filled beside the target, then renamed."""

import os
import secrets
import shutil
from pathlib import Path

from megatron.bridge.conversion.hf.errors import HFFolderError
from megatron.bridge.conversion.hf.names import CONFIG


class StagedFolder:
    """A hidden sibling of `target`, on the same file system, that `publish()` renames to `target`.

    Args:
        target: where the folder shall appear; missing parents are made.
        overwrite: take the place of a Hugging Face folder that is there.
        needed_bytes: how much will be written; refused now if the file system has less room.
        path: the sibling to fill, which may be there already from an earlier attempt; None makes a new one.

    Raises:
        HFFolderError: the target exists, its parent cannot be written, or the room is too small.
    """

    def __init__(self, target: Path, *, overwrite: bool, needed_bytes: int, path: Path | None = None) -> None:
        # A link is followed: what it points to is replaced, not the link.
        self.target = target.resolve()
        self._overwrite = overwrite
        self._made_parents = [parent for parent in self.target.parents if not parent.exists()]
        self.check_target()
        self.path = path or self._sibling("partial")
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(exist_ok=path is not None)
        except OSError as error:
            self._remove_made_parents()
            raise HFFolderError(
                f"{self.target} cannot be written: {error.strerror} ({error.filename}); choose another folder"
            ) from error
        free = shutil.disk_usage(self.path).free
        if free < needed_bytes:
            self.remove()
            raise HFFolderError(
                f"{self.target} needs {needed_bytes / 1e9:.2f} GB, its file system has {free / 1e9:.2f} GB free; "
                "make room or choose another folder"
            )

    def check_target(self) -> None:
        """Refuse a target that is there, unless it is a Hugging Face folder and may be overwritten."""
        target = self.target
        if not os.path.lexists(target):
            return
        if not self._overwrite:
            raise HFFolderError(
                f"{target} exists; choose another folder, remove it, or pass overwrite=True (--overwrite)"
            )
        replaceable = target.is_dir() and (
            (target / CONFIG).exists() or any(target.glob("*.safetensors")) or not any(target.iterdir())
        )
        if not replaceable:
            raise HFFolderError(f"{target} exists and is not a Hugging Face folder: it is not overwritten; remove it")

    def publish(self) -> None:
        """Rename to the target; one that is overwritten is moved away first and removed last."""
        self.check_target()
        replaced = self._sibling("replaced")
        try:
            sync_folder(self.path)
            if self.target.exists():
                self.target.rename(replaced)
            try:
                self.path.rename(self.target)
            except BaseException:
                if replaced.exists():
                    replaced.rename(self.target)
                raise
            sync_folder(self.target.parent)
        except OSError as error:
            raise HFFolderError(f"{self.target} cannot be put in place: {error.strerror} ({error.filename})") from error
        shutil.rmtree(replaced, ignore_errors=True)

    def remove(self) -> None:
        """Remove what was staged, and the parents that were made for it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._remove_made_parents()

    def _remove_made_parents(self) -> None:
        for parent in self._made_parents:
            try:
                parent.rmdir()
            except OSError:
                # Not there, or somebody else's files are in it by now.
                return

    def _sibling(self, role: str) -> Path:
        return self.target.with_name(f".{self.target.name}.{role}-{secrets.token_hex(4)}")


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (not the files' contents) survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
