"""What a run tells while it trains: metrics and messages, from rank 0 to the run's loggers."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from megatron.bridge.training.loggers import LOGGERS, MetricLogger

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.step import StepResult


def loggers_of(cfg: "ConfigContainer") -> Iterator[tuple[str, type[MetricLogger]]]:
    """Those that `logger.loggers` names, or else those that the other settings of the section ask for.

    Raises:
        UnknownPlugin: a name that nobody offers.
    """
    if cfg.logger.loggers is not None:
        yield from ((name, LOGGERS[name]) for name in cfg.logger.loggers)
        return
    for name in _BUILT_IN:
        if LOGGERS[name].wanted(cfg):
            yield name, LOGGERS[name]


# Which of them a run uses follows from its settings; others are used when they are named.
_BUILT_IN = ("console", "jsonl", "tensorboard", "wandb", "mlflow")


class Reporter:
    """Reports on rank 0 and is silent elsewhere; use it as a context manager.

    Args:
        cfg: the run's configuration.
        first: optimizer steps done before this call.
        speaks: whether this rank reports.
        states: what each logger said of itself in the checkpoint that the run resumes from.
    """

    def __init__(
        self, cfg: "ConfigContainer", first: int, speaks: bool, states: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._cfg, self._first, self._speaks, self._states = cfg, first, speaks, states
        self._loggers: dict[str, MetricLogger] = {}
        self._before = time.monotonic()
        self._tokens = 0

    def __enter__(self) -> Self:
        try:
            for name, logger in loggers_of(self._cfg) if self._speaks else ():
                self._loggers[name] = logger(self._cfg, self._first, self._states.get(name, {}))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for logger in self._loggers.values():
            logger.close()

    def due(self, iteration: int) -> bool:
        """Whether a step is one that is logged."""
        return iteration % self._cfg.logger.log_interval == 0 or iteration == self._cfg.train.total_iters

    def step(self, iteration: int, result: "StepResult", others: Callable[[], Mapping[str, float]] = dict) -> None:
        """Report a finished step, where it is one that is logged.

        Args:
            iteration: of the step.
            result: of the step.
            others: further metrics of it; called on every rank, for steps that are logged.
        """
        self._tokens += result.tokens
        if not self.due(iteration):
            return
        now = time.monotonic()
        metrics: dict[str, float | int | bool] = {
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens_per_second": round(self._tokens / max(now - self._before, 1e-9), 1),
        }
        if result.skipped:
            metrics["skipped"] = True
        if self._cfg.train.rampup_batch_size is not None:
            metrics["batch_size"] = result.sequences
        metrics |= others()
        self._before, self._tokens = now, 0
        self.metrics(iteration, metrics)

    def metrics(self, iteration: int, metrics: Mapping[str, float | int | bool]) -> None:
        """Report metrics of an iteration."""
        for logger in self._loggers.values():
            logger.log(iteration, metrics)

    def message(self, text: str) -> None:
        """Report a line for people."""
        logging.getLogger(__name__).info(text)
        for logger in self._loggers.values():
            logger.message(text)

    def states(self) -> dict[str, dict[str, Any]]:
        """What each logger needs to go on after a resume; empty where this rank does not report."""
        return {name: state for name, logger in self._loggers.items() if (state := logger.state())}
