"""Where Megatron checkpoints lie on disk: folder names, the `latest` pointer, and how a user's path is understood.

    ROOT/iter_0000010/                          one checkpoint (Megatron-Core's torch_dist format and side files)
    ROOT/latest_checkpointed_iteration.txt      the iteration to resume from; Megatron-LM's name and content

Nothing here imports torch: a path is judged before anything heavy is loaded.
"""

import os
import re
from pathlib import Path

from megatron.bridge.conversion.hf.staging import sync_folder
from megatron.bridge.errors import BridgeError, did_you_mean

LATEST_POINTER = "latest_checkpointed_iteration.txt"
METADATA_FILE = ".metadata"

_ANNOUNCED = f".{LATEST_POINTER}.partial"
_ITERATION_FOLDER = re.compile(r"iter_(\d{7,})")
_RELEASE = "release"


class CheckpointError(BridgeError):
    """A Megatron checkpoint is missing, damaged, or not the one that was asked for."""


def iteration_folder(root: str | Path, iteration: int) -> Path:
    """`ROOT/iter_0000010`, whether it exists or not."""
    return Path(root) / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """The iteration in the name of an iteration folder, `None` for a folder of another name."""
    match = _ITERATION_FOLDER.fullmatch(folder.name)
    return int(match.group(1)) if match else None


def saved_iterations(root: str | Path) -> list[int]:
    """Iterations that have a finished checkpoint under `root`, ascending."""
    folders = [entry.parent for entry in Path(root).glob(f"iter_*/{METADATA_FILE}")]
    return sorted(iteration for folder in folders if (iteration := iteration_of(folder)) is not None)


def latest_iteration(root: str | Path) -> int | None:
    """The iteration that the `latest` pointer of `root` names; `None` without a pointer or for a `release`.

    Raises:
        CheckpointError: the pointer holds neither a number nor `release`.
    """
    name = _read_pointer(Path(root))
    return None if name in (None, _RELEASE) else int(str(name))


def resolve(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: an iteration folder itself, or the latest one under a root.

    Raises:
        CheckpointError: there is none; the message lists what is there instead.
    """
    folder = Path(path)
    if not folder.is_dir():
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"checkpoint {str(folder)!r} {kind}{did_you_mean(folder.name, siblings)}")
    if (folder / METADATA_FILE).is_file():
        return folder
    pointed = _read_pointer(folder)
    if pointed is not None:
        return _pointed_folder(folder, pointed)
    raise CheckpointError(_why_not_a_checkpoint(folder))


def write_latest_pointer(root: Path, iteration: int) -> None:
    """Make `iteration` the one to resume from; the old pointer stays whole until the new one is on disk."""
    if _announced(root) != iteration:
        announce_latest(root, iteration)
    (root / _ANNOUNCED).replace(root / LATEST_POINTER)
    sync_folder(root)


def announce_latest(root: Path, iteration: int) -> None:
    """Write down which iteration the pointer is about to name, before its folder gets its name.

    Should the process die between the two, `announced_iteration` tells that the folder was verified.
    """
    with (root / _ANNOUNCED).open("w") as stream:
        stream.write(f"{iteration}")
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(root)


def announced_iteration(root: Path) -> int | None:
    """The iteration whose folder got its name, but not yet the pointer; `None` where nothing was left undone."""
    announced = _announced(root)
    return announced if announced in saved_iterations(root) else None


def _announced(root: Path) -> int | None:
    file = root / _ANNOUNCED
    content = file.read_text(errors="replace") if file.is_file() else ""
    return int(content) if content.isdecimal() else None


def _read_pointer(root: Path) -> str | None:
    pointer = root / LATEST_POINTER
    if not pointer.is_file():
        return None
    content = pointer.read_text(errors="replace").strip()
    if content != _RELEASE and not content.isdecimal():
        raise CheckpointError(
            f"{pointer} holds {content[:40]!r}, which is neither an iteration nor 'release'; "
            f"write the iteration to resume from into it{_listing(root)}"
        )
    return content


def _pointed_folder(root: Path, pointed: str) -> Path:
    folder = root / _RELEASE if pointed == _RELEASE else iteration_folder(root, int(pointed))
    if (folder / METADATA_FILE).is_file():
        return folder
    reason = _why_not_a_checkpoint(folder) if folder.is_dir() else f"there is no folder {folder.name!r}"
    raise CheckpointError(f"{root / LATEST_POINTER} points to {pointed!r}, but {reason}{_listing(root)}")


def _why_not_a_checkpoint(folder: Path) -> str:
    if any(folder.glob("mp_rank_*")):
        return (
            f"{str(folder)!r} is a checkpoint in Megatron-LM's legacy format (mp_rank_* folders); "
            "save it again with --ckpt-format torch_dist"
        )
    if (folder / "metadata.json").is_file() or any(folder.glob("*.distcp")):
        return (
            f"{str(folder)!r} is an incomplete checkpoint: {METADATA_FILE!r} is missing, "
            "so the writing was cut off or the copy left hidden files behind"
        )
    if (folder / "config.json").is_file():
        return (
            f"{str(folder)!r} is a Hugging Face folder, not a Megatron checkpoint; "
            "import it first (megatron-bridge convert import)"
        )
    return f"{str(folder)!r} is not a Megatron checkpoint{_listing(folder)}"


def _listing(folder: Path) -> str:
    iterations = saved_iterations(folder)
    if iterations:
        return f" (checkpoints there: {', '.join(f'iter_{iteration:07d}' for iteration in iterations[-10:])})"
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return f" (the folder holds: {shown})" if names else " (the folder is empty)"
