"""What a run tells while it trains: a progress line on rank 0, and one JSON record per logged step.

In a terminal the line is a rich progress bar; elsewhere (log files, CI) it is one plain line per logged step.
"""

import json
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.step import StepResult

METRICS_FILE = "metrics.jsonl"


class Reporter:
    """Reports on rank 0 and is silent elsewhere; use it as a context manager.

    Args:
        cfg: the run's configuration.
        first: optimizer steps done before this call.
        speaks: whether this rank reports.
    """

    def __init__(self, cfg: "ConfigContainer", first: int, speaks: bool) -> None:
        self._last = cfg.train.train_iters
        self._interval = cfg.logger.log_interval
        self._speaks = speaks
        self._shows = speaks and cfg.logger.progress
        folder = cfg.logger.folder or cfg.checkpoint.save
        self._metrics_path = Path(folder) / METRICS_FILE if folder is not None and speaks else None
        self._metrics: IO[str] | None = None
        self._tensorboard_dir = cfg.logger.tensorboard_dir if speaks else None
        self._tensorboard: Any = None
        self._bar: Any = None
        self._task: Any = None
        self._first = first
        self._started = self._before = time.monotonic()
        self._tokens = 0
        self._rate = 0.0

    def __enter__(self) -> Self:
        if self._metrics_path is not None:
            self._metrics_path.parent.mkdir(parents=True, exist_ok=True)
            # One line per write, so that a killed run leaves whole records.
            self._metrics = self._metrics_path.open("a", buffering=1)
        if self._tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            # A resumed run repeats the steps after its checkpoint: their earlier values are left out.
            self._tensorboard = SummaryWriter(self._tensorboard_dir, purge_step=self._first + 1)
        if self._shows:
            self._open_bar()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._metrics is not None:
            self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def step(self, iteration: int, result: "StepResult") -> None:
        """Report a finished step."""
        if not self._speaks:
            return
        self._tokens += result.tokens
        logged = iteration % self._interval == 0 or iteration == self._last
        if logged:
            now = time.monotonic()
            self._rate = self._tokens / max(now - self._before, 1e-9)
            self._before, self._tokens = now, 0
            self._record(
                iteration=iteration,
                loss=result.loss,
                learning_rate=result.learning_rate,
                grad_norm=result.grad_norm,
                tokens_per_second=round(self._rate, 1),
                **({"skipped": True} if result.skipped else {}),
            )
        if self._bar is not None:
            self._bar.update(self._task, completed=iteration, text=self._text(result))
        elif self._shows and logged:
            print(f"step {iteration}/{self._last} | {self._text(result)} | ETA {self._left(iteration)}", flush=True)

    def evaluation(self, iteration: int, loss: float, perplexity: float) -> None:
        """Report a validation loss."""
        self._record(iteration=iteration, valid_loss=loss)
        self.message(f"step {iteration}/{self._last} | validation loss {loss:.4f} | perplexity {perplexity:.4g}")

    def message(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        if not self._shows:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def _record(self, **values: Any) -> None:
        if self._metrics is not None:
            self._metrics.write(json.dumps(values) + "\n")
        if self._tensorboard is not None:
            iteration = values["iteration"]
            for name, value in values.items():
                if name != "iteration":
                    self._tensorboard.add_scalar(name, value, iteration)

    def _text(self, result: "StepResult") -> str:
        return (
            f"loss {result.loss:.4f} | lr {result.learning_rate:.2e} | grad norm {result.grad_norm:.3f} | "
            f"{self._rate:,.0f} tokens/s"
        )

    def _left(self, iteration: int) -> str:
        done = iteration - self._first
        seconds = round((time.monotonic() - self._started) / done * (self._last - iteration)) if done else 0
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console()
        if not console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("train", total=self._last, completed=self._first, text="starting")
        self._bar.start()
