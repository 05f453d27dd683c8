"""The best checkpoint of a run by validation loss, and stopping when there is no better one."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.callbacks import Callback

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.state import RunState

BEST = "best"
_RECORD = "best.json"


class KeepBest(Callback):
    """Keeps the weights of the lowest validation loss in `best/` under `checkpoint.save`.

    A resumed run goes on with the best of before.

    Args:
        patience: stop after so many evaluations in a row without a lower loss; None never stops.
    """

    def __init__(self, patience: int | None = None) -> None:
        if patience is not None and patience < 1:
            raise BridgeError(f"patience={patience} must be at least 1; None never stops early")
        self._patience = patience
        self.loss: float | None = None
        self.iteration: int | None = None
        self._worse = 0

    def on_train_start(self, run: "RunState") -> None:
        if run.cfg.checkpoint.save is None or run.cfg.train.eval_interval is None:
            raise BridgeError(
                "the best checkpoint is found by evaluation and saved: set train.eval_interval and checkpoint.save"
            )
        record = best_folder(run.cfg) / _RECORD
        if run.progress.iteration and record.is_file():
            known = json.loads(record.read_text("utf-8"))
            self.loss, self.iteration, self._worse = known["loss"], known["iteration"], known["worse"]

    def on_evaluate_end(self, run: "RunState", loss: float) -> None:
        if self.loss is None or loss < self.loss:
            self.loss, self.iteration, self._worse = loss, run.progress.iteration, 0
            _save(run)
        else:
            self._worse += 1
        self._write_down(run)
        if self._patience is not None and self._worse >= self._patience:
            run.request_stop(
                f"no validation loss below {self.loss:.4f} (step {self.iteration}) in {self._worse} evaluations"
            )

    def _write_down(self, run: "RunState") -> None:
        from megatron.bridge import platform

        if platform.is_rank_zero():
            record = {"loss": self.loss, "iteration": self.iteration, "worse": self._worse}
            file = best_folder(run.cfg) / _RECORD
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(record) + "\n", "utf-8")
            partial.rename(file)


def best_folder(cfg: "ConfigContainer") -> Path:
    """Where the best checkpoint of a run lies, once there is one."""
    assert cfg.checkpoint.save is not None
    return Path(cfg.checkpoint.save) / BEST


def _save(run: "RunState") -> None:
    """The weights as they are now, in the place of those that were best before. Collective."""
    from megatron.bridge.training.checkpoint import save_checkpoint
    from megatron.bridge.training.retention import forget_older

    kept = dataclasses.replace(run.cfg.checkpoint, save=str(best_folder(run.cfg)), most_recent_k=1)
    cfg = dataclasses.replace(run.cfg, checkpoint=kept)
    save_checkpoint(run.progress.iteration, run.model, None, None, cfg, run.progress.consumed_samples)
    forget_older(dataclasses.replace(kept, pretrained_checkpoint=None))
