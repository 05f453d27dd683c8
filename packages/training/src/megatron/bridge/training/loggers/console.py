"""The console: in a terminal a rich progress bar; elsewhere (log files, CI) one plain line per logged step."""

import math
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.training.loggers.base import MetricLogger, Metrics

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


class ConsoleLogger(MetricLogger):
    """Progress with loss, learning rate, gradient norm, speed and the time that is left."""

    setting: ClassVar[str | None] = "progress"

    def __init__(self, cfg: "ConfigContainer", first: int, state: Mapping[str, Any]) -> None:
        super().__init__(cfg, first, state)
        self._last = cfg.train.total_iters
        self._started = time.monotonic()
        self._bar: Any = None
        self._open_bar()

    def log(self, iteration: int, metrics: Metrics) -> None:
        if "valid_loss" in metrics:
            loss = metrics["valid_loss"]
            # Above this the exponential overflows a float.
            perplexity = math.exp(loss) if loss < 700 else math.inf
            self.message(f"step {iteration}/{self._last} | validation loss {loss:.4f} | perplexity {perplexity:.4g}")
        elif self._bar is not None:
            self._bar.update(self._task, completed=iteration, text=_text(metrics))
        else:
            print(f"step {iteration}/{self._last} | {_text(metrics)} | ETA {self._left(iteration)}", flush=True)

    def message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _left(self, iteration: int) -> str:
        done = iteration - self.first
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
        self._task = self._bar.add_task("train", total=self._last, completed=self.first, text="starting")
        self._bar.start()


def _text(metrics: Metrics) -> str:
    others = "".join(f"{short} {metrics[name]:.4f} | " for name, short in _auxiliary(metrics))
    return (
        f"loss {metrics['loss']:.4f} | {others}lr {metrics['learning_rate']:.2e} | "
        f"grad norm {metrics['grad_norm']:.3f} | {metrics['tokens_per_second']:,.0f} tokens/s{_speed(metrics)}"
    )


def _speed(metrics: Metrics) -> str:
    forms = (
        ("tflops_per_device", " | {:.3g} TFLOP/s"),
        ("mfu", " | MFU {:.1%}"),
        ("memory_gib", " | {:.2f} GiB"),
    )
    return "".join(form.format(metrics[name]) for name, form in forms if name in metrics)


def _auxiliary(metrics: Metrics) -> Iterator[tuple[str, str]]:
    """Losses beside the main one: the metric's name, and a short one."""
    for name in metrics:
        if name.endswith("_loss"):
            yield name, name.removesuffix("_loss").replace("load_balancing", "balance").replace("_", " ")
