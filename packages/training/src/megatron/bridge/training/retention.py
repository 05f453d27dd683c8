"""Which checkpoints of a run stay, and what goes that is none."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.conversion.checkpoint_layout import CheckpointError, iteration_folder, resolve, saved_iterations
from megatron.bridge.conversion.rank_agreement import on_rank_zero
from megatron.bridge.training.hf_side import is_hf_folder

if TYPE_CHECKING:
    from megatron.bridge.training.config import CheckpointConfig


def forget_older(checkpoint: "CheckpointConfig") -> None:
    """Remove all but the `most_recent_k` newest checkpoints in `checkpoint.save`. Collective.

    What the run started from stays. A checkpoint is renamed before its files go, so that none is ever half there.
    """
    if checkpoint.save is None or checkpoint.most_recent_k is None:
        return
    root, start, newest = Path(checkpoint.save), checkpoint.pretrained_checkpoint, checkpoint.most_recent_k
    kept = None if start is None or is_hf_folder(start) else resolve(start).resolve()

    def remove_older() -> None:
        for iteration in saved_iterations(root)[:-newest]:
            folder = iteration_folder(root, iteration)
            if folder.resolve() != kept:
                _remove(folder)

    on_rank_zero(remove_older, f"cannot remove old checkpoints in {root}", CheckpointError)


def forget_leftovers(checkpoint: "CheckpointConfig") -> None:
    """Remove what a killed process was writing or removing in `checkpoint.save`. Collective."""
    if checkpoint.save is None:
        return
    root = Path(checkpoint.save)

    def remove() -> None:
        for unfinished in ("partial", "removed"):
            for folder in root.glob(f".iter_*.{unfinished}"):
                shutil.rmtree(folder)

    on_rank_zero(remove, f"cannot remove what was left in {root}", CheckpointError)


def _remove(folder: Path) -> None:
    going = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(going, ignore_errors=True)  # left by a process that was killed in between
    folder.rename(going)
    shutil.rmtree(going)
