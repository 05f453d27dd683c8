"""Callbacks: code of a run's own at fixed moments of the loop, on every rank."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.training.state import RunState, TrainResult
    from megatron.bridge.training.step import StepResult


class Callback:
    """Does nothing; a subclass overrides the moments that it wants.

    Every method is called on every rank, in the order in which the callbacks were given. What one raises ends the run,
    as an error of the loop itself does. `run.request_stop("reason")` ends it after the step in progress, with a
    checkpoint.
    """

    def on_train_start(self, run: "RunState") -> None:
        """Everything is built and loaded; `run.progress` says where the run stands."""

    def on_batch(self, run: "RunState", batch: "dict[str, Tensor]") -> None:
        """A micro-batch of training data was drawn: `[micro batch, sequence]`, to look at or to change in place."""

    def on_gradients(self, run: "RunState") -> None:
        """Forward and backward passes of a step are done and the gradients are reduced (`parameter.main_grad`)."""

    def on_step_end(self, run: "RunState", result: "StepResult") -> None:
        """A step is done and counted in `run.progress`."""

    def on_evaluate_end(self, run: "RunState", loss: float) -> None:
        """The validation split was evaluated; `loss` is the mean per token."""

    def on_save(self, run: "RunState", folder: Path) -> None:
        """A checkpoint was written and verified."""

    def on_train_end(self, run: "RunState", result: "TrainResult") -> None:
        """The loop is done, also when a stop was asked for; not called after an error."""


class Callbacks:
    """The callbacks of a run, called as one: `callbacks.on_step_end(run, result)`."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)

    def __getattr__(self, moment: str) -> Any:
        if not hasattr(Callback, moment):
            raise AttributeError(moment)

        def call(*arguments: Any) -> None:
            for callback in self._callbacks:
                getattr(callback, moment)(*arguments)

        return call

    def watched(self, run: "RunState", data: Any) -> Any:
        """The data, each micro-batch shown to those that want to see them; unchanged where none does."""
        watching = [each for each in self._callbacks if type(each).on_batch is not Callback.on_batch]
        if data is None or not watching:
            return data
        return self._shown(run, data, watching)

    @staticmethod
    def _shown(run: "RunState", data: Any, watching: list[Callback]) -> Any:
        for batch in data:
            for callback in watching:
                callback.on_batch(run, batch)
            yield batch
