"""Which checkpoint a run resumes from when the newest one is damaged: the newest that is whole."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.conversion.checkpoint_files import check_files, listed, read_metadata
from megatron.bridge.conversion.checkpoint_layout import (
    METADATA_FILE,
    CheckpointError,
    announced_iteration,
    iteration_folder,
    iteration_of,
    resolve,
    saved_iterations,
    write_latest_pointer,
)

if TYPE_CHECKING:
    from megatron.bridge.training.config import CheckpointConfig


@dataclass(frozen=True)
class Found:
    """A checkpoint to resume from.

    Attributes:
        folder: it is whole.
        damaged: newer ones, and what is wrong with each.
        pointer: what is wrong with the root's `latest` pointer, None where nothing is.
    """

    folder: Path
    damaged: Mapping[Path, str] = field(default_factory=dict)
    pointer: str | None = None

    def notices(self) -> list[str]:
        """What a user should know of it."""
        problems = [self.pointer] if self.pointer else []
        return [f"{problem}; going on from {self.folder}" for problem in (*problems, *self.damaged.values())]


def resumed_path(checkpoint: "CheckpointConfig") -> Path | None:
    """What `checkpoint.load` and `checkpoint.ckpt_step` name; None for a run that resumes from nothing."""
    if checkpoint.load is None or checkpoint.ckpt_step is None:
        return None if checkpoint.load is None else Path(checkpoint.load)
    return iteration_folder(checkpoint.load, checkpoint.ckpt_step)


def newest_whole(path: str | Path, *, every_bit: bool = False) -> Found:
    """The checkpoint that `path` means: a folder chosen by name as it is; under a root, the newest that is whole.

    Under a root the `latest` pointer says which is the newest. Where a process died before it could move the pointer
    to a finished checkpoint, that one is; where the pointer is damaged or names what is not there, the last one is.

    Args:
        path: a checkpoint root, or one iteration folder.
        every_bit: compare all files with the digests that were recorded when they were written, each rank its share of
            them; a folder chosen by name too. Collective. Otherwise only what is missing or cut off is found.

    Raises:
        CheckpointError: there is none; the message says why of each.
    """
    root = Path(path)
    problem_of = _problem_of_any_rank if every_bit else _problem
    if not root.is_dir() or (root / METADATA_FILE).is_file():
        chosen = resolve(root)
        if every_bit and (problem := problem_of(chosen)):
            raise CheckpointError(problem)
        return Found(chosen)
    candidates, pointer = _candidates(root)
    damaged: dict[Path, str] = {}
    for folder in candidates:
        problem = problem_of(folder)
        if problem is None:
            return Found(folder, damaged, pointer)
        damaged[folder] = problem
    raise CheckpointError("; ".join(damaged.values()))


def _candidates(root: Path) -> tuple[list[Path], str | None]:
    """Folders to try, the best first, and what is wrong with the pointer."""
    finished, problem = saved_iterations(root), None
    try:
        first = resolve(root)
    except CheckpointError as error:
        if not finished:
            raise
        first, problem = iteration_folder(root, finished[-1]), str(error)
    announced, newest = announced_iteration(root), iteration_of(first)
    if announced is not None and (problem or newest is None or announced > newest):
        first, newest, problem = iteration_folder(root, announced), announced, None
    older = [number for number in reversed(finished) if newest is not None and number < newest]
    return [first, *(iteration_folder(root, number) for number in older)], problem


def _problem(folder: Path) -> str | None:
    try:
        check_files(folder, read_metadata(folder))
    except CheckpointError as error:
        return str(error)
    return None


def _problem_of_any_rank(folder: Path) -> str | None:
    from megatron.bridge import platform
    from megatron.bridge.conversion.integrity import wrong_files
    from megatron.bridge.conversion.rank_agreement import gather

    problem = _problem(folder)
    found: list[str] = [problem] if problem else []
    if not found:
        try:
            found = wrong_files(folder, platform.rank(), platform.world_size())
        except CheckpointError as error:
            found = [str(error)]
    everywhere = sorted({text for texts in gather(found) for text in texts})
    if not everywhere:
        return None
    return problem or f"checkpoint {folder} is damaged: {listed(everywhere)}"


def set_aside(found: Found) -> None:
    """Make `found` the latest, and give damaged ones names under which they are no checkpoints. Collective.

    The run can then save their iterations again.
    """
    from megatron.bridge.conversion.rank_agreement import on_rank_zero

    iteration = iteration_of(found.folder)
    if iteration is None:
        return

    def rename() -> None:
        write_latest_pointer(found.folder.parent, iteration)
        for folder in found.damaged:
            free = (folder.with_name(f"{folder.name}.damaged{number or ''}") for number in range(1000))
            folder.rename(next(name for name in free if not name.exists()))

    on_rank_zero(rename, "cannot set damaged checkpoints aside", CheckpointError)
