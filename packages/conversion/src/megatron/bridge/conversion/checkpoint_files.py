"""The files of a Megatron checkpoint: opened beside their final name, looked through, renamed when they are whole."""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.conversion.checkpoint_layout import (
    METADATA_FILE,
    CheckpointError,
    announce_latest,
    write_latest_pointer,
)
from megatron.bridge.conversion.hf.staging import sync_folder
from megatron.bridge.conversion.integrity import MANIFEST
from megatron.bridge.conversion.rank_agreement import reason

if TYPE_CHECKING:
    from torch.distributed.checkpoint import Metadata

type SideFiles = Mapping[str, str | bytes | Path]

FORMAT_FILE = "metadata.json"
_LISTED = 12  # names printed per problem before "and N more"


def open_partial(target: Path, partial: Path, overwrite: bool, nbytes: int) -> None:
    """Make the empty folder that is to become `target` and to hold `nbytes` of tensors."""
    if target.exists() and not overwrite:
        raise CheckpointError(
            f"{target} exists; save into another folder, remove it, or pass overwrite=True (--overwrite)"
        )
    if partial.exists():  # left by a run that was killed while writing
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or partial} cannot be made ({error.strerror}); save into another folder"
        ) from error
    free = shutil.disk_usage(partial).free
    if free < nbytes:
        raise CheckpointError(
            f"{target} needs {nbytes / 1e9:.3g} GB, and its file system has {free / 1e9:.3g} GB free; make room, or "
            "save into another folder"
        )


def see_folder(partial: Path) -> None:
    """Refuse a folder of rank 0's that this rank does not see."""
    if not partial.is_dir():
        raise CheckpointError(
            f"{partial.parent} is not shared: rank 0 created a folder there that this rank cannot see"
        )


def write_side_files(folder: Path, side_files: SideFiles) -> None:
    """Put text, bytes, files and folders into a checkpoint that holds nothing yet."""
    for name, content in side_files.items():
        target = folder / name
        taken = name in (METADATA_FILE, FORMAT_FILE, MANIFEST) or name.endswith(".distcp")
        if taken or Path(name).name != name:
            raise CheckpointError(f"a side file cannot be called {name!r}: give a plain name that is not taken")
        if isinstance(content, Path):
            if content.is_dir():
                shutil.copytree(content, target)
            else:
                shutil.copyfile(content, target)
        elif isinstance(content, bytes):
            target.write_bytes(content)
        else:
            target.write_text(content)


class Prepared:
    """Files that were written for a checkpoint, on its file system: moved into it, or back where they were.

    Args:
        folder: that holds nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries = sorted(each.name for each in folder.iterdir())

    def move_into(self, checkpoint: Path) -> None:
        """Move all of them into a checkpoint."""
        self._move(self.folder, checkpoint)

    def take_back(self, checkpoint: Path) -> None:
        """Move out of a checkpoint what was moved into it."""
        self._move(checkpoint, self.folder)

    def _move(self, origin: Path, target: Path) -> None:
        for name in self._entries:
            if (origin / name).exists():
                (origin / name).rename(target / name)


def write_format(folder: Path) -> None:
    """Say which format the folder has, as Megatron-Core does at the end of a save."""
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def publish(partial: Path, target: Path, iteration: int) -> None:
    """Rename a finished folder to its name, in place of one that is there, and make it the latest."""
    announce_latest(target.parent, iteration)
    if target.exists():
        old = target.with_name(f".{target.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed in between
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old)
    else:
        partial.rename(target)
    sync_folder(target.parent)
    write_latest_pointer(target.parent, iteration)


def read_metadata(folder: Path) -> "Metadata":
    """The metadata of a checkpoint folder.

    Raises:
        CheckpointError: it cannot be read, or is something else.
    """
    from torch.distributed.checkpoint import FileSystemReader, Metadata

    from megatron.bridge.platform.memory_limit import memory_limit

    file = folder / METADATA_FILE
    try:
        # The metadata is a pickle, in which a single wrong bit can ask for gigabytes before anything else goes wrong.
        with memory_limit(2**30 + 100 * file.stat().st_size):
            metadata = FileSystemReader(folder).read_metadata()
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read ({reason(error)}); take another checkpoint") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{file} holds a {type(metadata).__name__}, not checkpoint metadata")
    return metadata


def check_files(folder: Path, metadata: "Metadata") -> None:
    """Refuse a checkpoint that lacks a file its metadata names, or holds one cut off."""
    needed: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    problems = []
    for name, size in sorted(needed.items()):
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size < size:
            problems.append(f"{name} is cut off: {file.stat().st_size} of at least {size} bytes")
    if not (folder / FORMAT_FILE).is_file():
        problems.append(f"{FORMAT_FILE} is missing")
    if problems:
        raise CheckpointError(f"checkpoint {folder} is damaged: {listed(problems)}; copy it again or take another one")


def listed(names: Collection[str], separator: str = ", ") -> str:
    """The first names in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return separator.join(ordered[:_LISTED]) + more
