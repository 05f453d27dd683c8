"""Stopping gracefully: a signal or a time limit ends the run after the step in progress, on every rank alike."""

import signal
import threading
import time
from types import FrameType
from typing import Any, Self

CALLBACK = "callback"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers Ctrl-C and SIGTERM while it is open, and puts the earlier handlers back.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread Python allows no handlers: signals then
    keep their usual effect.

    Args:
        signals: whether to catch signals at all.
        minutes: time limit of the run; None for none.
    """

    def __init__(self, signals: bool = True, minutes: float | None = None) -> None:
        self._catch = signals and threading.current_thread() is threading.main_thread()
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._received: signal.Signals | None = None
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if self._catch:
            self._earlier = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or signal.Signals(number)

    def reason(self, asked: bool = False) -> str | None:
        """Why to stop: `"SIGINT"`, `"SIGTERM"`, `"exit_duration"`, `"callback"`, or None; on all ranks alike.

        Collective over the world: what reached one rank stops all of them at the same step.

        Args:
            asked: a callback of this rank asks for it.
        """
        import torch
        import torch.distributed as dist

        from megatron.bridge.platform import device

        reasons = (None, CALLBACK, "exit_duration", *(number.name for number in _SIGNALS))
        mine = self._received.name if self._received else CALLBACK if asked else None
        if mine in (None, CALLBACK) and self._deadline is not None and time.monotonic() > self._deadline:
            mine = "exit_duration"
        agreed = torch.tensor(reasons.index(mine), device=device())
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        return reasons[int(agreed)]
