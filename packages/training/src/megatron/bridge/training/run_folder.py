"""A run folder: everything of a run in one place, whatever started it and however often.

`run_config.yaml` (as it was last started), `starts.jsonl` (when, by which command, with which versions and values),
`metrics.jsonl`, `checkpoints/`, `logs/rank_00000.log` and so on, `stopped_by.txt`. Torch-free.
"""

import contextlib
import datetime
import json
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.callbacks import Callback

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.state import RunState, TrainResult

CHECKPOINTS = "checkpoints"
LOGS = "logs"
STARTS = "starts.jsonl"
STOPPED_BY = "stopped_by.txt"


def use_run_folder(cfg: "ConfigContainer", folder: str | Path, *, resume: bool = False) -> None:
    """Send checkpoints and metrics of `cfg` into `folder`, but for those that have a place already.

    Args:
        cfg: is changed.
        folder: need not exist; nothing is written yet.
        resume: go on from the newest checkpoint in it, where there is one.

    Raises:
        BridgeError: the folder holds a run already, and `resume` is not set.
    """
    from megatron.bridge.conversion.checkpoint_layout import saved_iterations

    root = Path(folder)
    if (root / STARTS).exists() and not resume:
        raise BridgeError(f"{str(root)!r} holds a run already; go on with it by --resume, or take another --run-folder")
    checkpoint = cfg.checkpoint
    checkpoint.save = checkpoint.save or str(root / CHECKPOINTS)
    cfg.logger.folder = cfg.logger.folder or str(root)
    if resume and checkpoint.load is None and saved_iterations(checkpoint.save):
        checkpoint.load, checkpoint.pretrained_checkpoint = checkpoint.save, None


class RunRecord(Callback):
    """Writes down what runs, when the loop starts, and what ended it; on rank 0.

    Args:
        folder: the run folder.
        command: what was asked for, as words.
    """

    def __init__(self, folder: str | Path, command: Sequence[str]) -> None:
        self._root, self._command = Path(folder), list(command)

    def on_train_start(self, run: "RunState") -> None:
        from megatron.bridge import platform
        from megatron.bridge.training.provenance import git_commit, versions
        from megatron.bridge.training.run_config import described, to_yaml
        from megatron.bridge.training.side_files import RUN_CONFIG

        if not platform.is_rank_zero():
            return
        self._root.mkdir(parents=True, exist_ok=True)
        (self._root / STOPPED_BY).unlink(missing_ok=True)
        (self._root / RUN_CONFIG).write_text(to_yaml(run.cfg), "utf-8")
        self._append(
            {
                "event": "start",
                "time": _now(),
                "command": self._command,
                "folder": str(Path.cwd()),
                "host": socket.gethostname(),
                "world_size": platform.world_size(),
                "iteration": run.progress.iteration,
                "git": git_commit(Path.cwd()),
                "versions": versions(),
                "config": described(run.cfg),
            }
        )

    def on_train_end(self, run: "RunState", result: "TrainResult") -> None:
        from megatron.bridge import platform

        if platform.is_rank_zero():
            ended = {"event": "end", "time": _now(), "iteration": result.iteration, "stopped_by": result.stopped_by}
            self._append(ended)
            (self._root / STOPPED_BY).write_text(result.stopped_by + "\n", "utf-8")

    def _append(self, record: dict[str, object]) -> None:
        with (self._root / STARTS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


@contextlib.contextmanager
def recorded(folder: str | Path, command: Sequence[str]) -> Iterator[RunRecord]:
    """This rank's log in the run folder, and the callback that keeps the record.

    Within the block the output of rank 0 goes where it always goes, that of the others into their logs.
    """
    from megatron.bridge.training.rank_log import rank_log

    with rank_log(Path(folder) / LOGS, " ".join(command)):
        yield RunRecord(folder, command)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
