"""Where the time of a rank's steps goes, phase by phase."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# `other`: zeroing buffers, the loss over all ranks, callbacks.
PHASES = ("data_wait", "forward_backward", "gradient_sync", "optimizer", "other")


class Taken(NamedTuple):
    """What steps took.

    Attributes:
        step: seconds per step.
        by_phase: seconds per step by phase, in the order of `PHASES`, of the steps whose phases were told apart.
    """

    step: float
    by_phase: list[float]


class Phases:
    """Measures phases, which may lie within each other: time counts for the innermost.

    Use it as `with phases("optimizer"):`. On a GPU the host runs ahead of the device; the phases end where it waits for
    the device in any case, or where `finish_gradients` makes it wait. That costs time, so not every step need do it.

    Attributes:
        told_apart: whether this step's phases are measured, or only the whole of it.
        marked: the phases show up in profiles.
        told: called with each phase as it ends, and the times (`time.perf_counter`) of its begin and end.
    """

    def __init__(self) -> None:
        self._open: list[str] = []
        self._since = 0.0
        self.told_apart = True
        self.marked = False
        self.told: Callable[[str, float, float], None] | None = None
        self._forget()

    def _forget(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._told_apart, self._whole, self._steps = 0, 0.0, 0

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time of the block for `phase`."""
        self._charge()
        self._open.append(phase)
        begin = self._since
        try:
            with _mark(phase) if self.marked else contextlib.nullcontext():
                yield
        finally:
            self._charge()
            self._open.pop()
            if self.told is not None:
                self.told(phase, begin, self._since)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step, with its phases within."""
        begin = time.perf_counter()
        with self("other"):
            yield
        self._whole += time.perf_counter() - begin
        self._steps += 1
        self._told_apart += self.told_apart

    def waiting(self, data: Any) -> Any:
        """`data`, with the time that each batch takes counted as waiting for data."""
        return None if data is None else self._timed(data)

    def taken(self) -> Taken:
        """What was measured since the last call."""
        measured = max(self._told_apart, 1)
        found = Taken(self._whole / max(self._steps, 1), [each / measured for each in self._seconds.values()])
        self._forget()
        return found

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open and self.told_apart:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now

    def _timed(self, data: Any) -> Iterator[Any]:
        batches = iter(data)
        while True:
            with self("data_wait"):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch


def _mark(phase: str) -> contextlib.AbstractContextManager[object]:
    from torch.profiler import record_function

    return record_function(phase)
