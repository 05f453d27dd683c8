"""The state from which a step can be done again: data, random state and buffers. Weights change at its end only."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.live_weights import as_chunks
from megatron.bridge.training.random_state import put_back, state_of_this_rank

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.training.state import Batches, RunState


class BeforeStep:
    """How `run` stands before a step.

    Attributes:
        recorded: the run's data, to be used for the step: what is drawn is kept.
    """

    def __init__(self, run: "RunState") -> None:
        self._model = as_chunks(run.model)
        self._random = state_of_this_rank()
        # Routers count tokens and move their biases during the passes.
        self._buffers = [{name: value.clone() for name, value in chunk.named_buffers()} for chunk in self._model]
        self._drawn: list[list[dict[str, Tensor]] | None] = [None if data is None else [] for data in run.train_data]
        self.recorded: list[Batches] = [
            None if data is None or kept is None else _keeping(data, kept)
            for data, kept in zip(run.train_data, self._drawn, strict=True)
        ]

    def restore(self) -> None:
        """Put random state and buffers back."""
        put_back(self._random)
        self.restore_buffers()

    def restore_buffers(self) -> None:
        """Put the buffers back, as if the step had not been."""
        for chunk, saved in zip(self._model, self._buffers, strict=True):
            for name, value in chunk.named_buffers():
                value.copy_(saved[name])

    def replayed(self) -> "list[Batches]":
        """The micro-batches that were drawn, once more."""
        return [None if kept is None else iter([dict(batch) for batch in kept]) for kept in self._drawn]


def _keeping(data: Any, kept: list[dict[str, "Tensor"]]) -> Iterator[dict[str, "Tensor"]]:
    for batch in data:
        kept.append(dict(batch))
        yield batch
