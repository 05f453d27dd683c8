"""Saving within the loop: again when it fails, and what then."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.conversion.checkpoint_layout import CheckpointError
from megatron.bridge.training.checkpoint import save
from megatron.bridge.training.retention import forget_older

if TYPE_CHECKING:
    from megatron.bridge.training.reporter import Reporter
    from megatron.bridge.training.state import RunState


def save_or_go_on(run: "RunState", reporter: "Reporter", *, last: bool) -> Path | None:
    """Save, tell, and tidy up. Collective.

    Args:
        run: to save.
        reporter: is told what happened.
        last: the run ends here, so that there is nothing to go on with.

    Returns:
        The finished folder; None where saving failed and training goes on (`checkpoint.go_on_without`).

    Raises:
        CheckpointError: saving failed for good. The checkpoints before are as they were.
    """
    settings = run.cfg.checkpoint
    for attempt in range(settings.save_retries + 1):
        try:
            folder = save(run)
        except CheckpointError as error:
            reporter.message(f"saving step {run.progress.iteration} failed: {error}")
            if attempt < settings.save_retries:
                time.sleep(2**attempt)
            elif last or not settings.go_on_without:
                raise
        else:
            reporter.message(f"checkpoint {folder}")
            run.callbacks.on_save(run, folder)
            forget_older(settings)
            return folder
    return None
