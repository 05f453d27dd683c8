"""Saving within the loop: at once or in the background, again when it fails, and what then."""

import contextlib
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from megatron.bridge.conversion.checkpoint_layout import CheckpointError
from megatron.bridge.training.checkpoint import start_save
from megatron.bridge.training.fault_tolerance import StepFault
from megatron.bridge.training.retention import forget_leftovers, forget_older

if TYPE_CHECKING:
    from megatron.bridge.conversion.dist_checkpoint import CheckpointSave
    from megatron.bridge.training.reporter import Reporter
    from megatron.bridge.training.state import RunState


class Saver:
    """Saves a run while it trains, tells, and tidies up. A context manager; every method is collective.

    At most one checkpoint is under way: the next save, and the end of the run, wait for it.

    Attributes:
        newest: the last checkpoint that was finished, None before the first.
    """

    def __init__(self, run: "RunState", reporter: "Reporter") -> None:
        self._run, self._reporter = run, reporter
        self._settings = run.cfg.checkpoint
        self._pending: CheckpointSave | None = None
        self._iteration, self._failures = 0, 0
        self._scratch = tempfile.TemporaryDirectory()
        self.newest: Path | None = None

    def __enter__(self) -> Self:
        forget_leftovers(self._settings)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if error is None:
                self.settle(last=True)
            elif isinstance(error, StepFault):
                # It ends every rank at the same step; after other errors a peer may be gone, and is not waited for.
                with contextlib.suppress(CheckpointError):  # told, and less than the error that is on its way
                    self.settle(last=True)
        finally:
            self._scratch.cleanup()

    def save(self, *, last: bool) -> None:
        """Save the run as it is now; with `checkpoint.async_save` only begin to, unless it is the `last` time.

        Raises:
            CheckpointError: saving failed for good (see `settle`).
        """
        self.settle()
        self._iteration, self._failures = self._run.progress.iteration, 0
        self._pending = self._begun(last=last)
        if self._pending is None:
            return
        self._pending.write()
        if last or not self._settings.async_save:
            self.settle(last=last)

    def _begun(self, *, last: bool) -> "CheckpointSave | None":
        """A save that is about to write; None where not even that could be, and the run goes on without."""
        while True:
            try:
                return start_save(self._run, Path(tempfile.mkdtemp(dir=self._scratch.name)))
            except CheckpointError as error:
                self._tell(error)
                if self._failures == self._settings.save_retries:
                    self._give_up(error, last=last)
                    return None
                time.sleep(2**self._failures)
                self._failures += 1

    def look(self) -> None:
        """Finish a save in the background whose bytes are all written; wait for none."""
        if self._pending is not None and self._pending.ready():
            self._finish(self._pending, last=False)

    def settle(self, *, last: bool = False) -> None:
        """Wait for the save that is under way.

        Args:
            last: the run ends here, so that there is nothing to go on with.

        Raises:
            CheckpointError: it failed for good, and the run may not go on without (`checkpoint.go_on_without`). The
                checkpoints before are as they were.
        """
        while self._pending is not None:
            self._finish(self._pending, last=last)

    def _finish(self, pending: "CheckpointSave", *, last: bool) -> None:
        try:
            folder = pending.finish()
        except CheckpointError as error:
            self._failed(pending, error, last=last)
            return
        self._pending, self.newest = None, folder
        self._reporter.message(f"checkpoint {folder}")
        self._run.callbacks.on_save(self._run, folder)
        forget_older(self._settings)

    def _failed(self, pending: "CheckpointSave", error: CheckpointError, *, last: bool) -> None:
        self._tell(error)
        if self._failures < self._settings.save_retries:
            pending.write(wait=2**self._failures)
            self._failures += 1
            return
        self._pending = None
        self._give_up(error, last=last)

    def _tell(self, error: CheckpointError) -> None:
        self._reporter.message(f"saving step {self._iteration} failed: {error}")

    def _give_up(self, error: CheckpointError, *, last: bool) -> None:
        forget_leftovers(self._settings)
        if last or not self._settings.go_on_without:
            raise error
