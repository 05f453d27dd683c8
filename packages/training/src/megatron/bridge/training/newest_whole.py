"""Which checkpoint a run resumes from when the newest one is damaged: the newest that is whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.bridge.conversion.checkpoint_layout import (
    METADATA_FILE,
    CheckpointError,
    iteration_folder,
    iteration_of,
    resolve,
    saved_iterations,
    write_latest_pointer,
)


@dataclass(frozen=True)
class Found:
    """A checkpoint to resume from.

    Attributes:
        folder: it is whole.
        damaged: newer ones, and what is wrong with each.
    """

    folder: Path
    damaged: Mapping[Path, str]

    def notices(self) -> list[str]:
        """What a user should know of it."""
        return [f"{problem}; going on from {self.folder}" for problem in self.damaged.values()]


def newest_whole(path: str | Path) -> Found:
    """The checkpoint that `path` means: a folder chosen by name as it is; under a root, the newest that is whole.

    Raises:
        CheckpointError: there is none; the message says why of each.
    """
    chosen = resolve(path)
    if (Path(path) / METADATA_FILE).is_file():
        return Found(chosen, {})
    newest = iteration_of(chosen)
    older = [iteration for iteration in saved_iterations(path) if newest is not None and iteration < newest]
    damaged: dict[Path, str] = {}
    for folder in (chosen, *(iteration_folder(path, iteration) for iteration in reversed(older))):
        problem = _problem(folder)
        if problem is None:
            return Found(folder, damaged)
        damaged[folder] = problem
    raise CheckpointError("; ".join(damaged.values()))


def _problem(folder: Path) -> str | None:
    from megatron.bridge.conversion.dist_checkpoint import check_files, read_metadata

    try:
        check_files(folder, read_metadata(folder))
    except CheckpointError as error:
        return str(error)
    return None


def set_aside(found: Found) -> None:
    """Give the damaged ones names under which they are no checkpoints, so that the run can save again. Collective."""
    from megatron.bridge.conversion.rank_agreement import on_rank_zero

    def rename() -> None:
        iteration = iteration_of(found.folder)
        if iteration is not None:
            write_latest_pointer(found.folder.parent, iteration)
        for folder in found.damaged:
            free = (folder.with_name(f"{folder.name}.damaged{number or ''}") for number in range(1000))
            folder.rename(next(name for name in free if not name.exists()))

    if found.damaged:
        on_rank_zero(rename, "cannot set damaged checkpoints aside", CheckpointError)
