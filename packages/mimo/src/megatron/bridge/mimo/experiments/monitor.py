"""Measures a run's steps on this rank, from the training loop's own moments, and exchanges nothing to do so.

First come steps that nothing disturbs, which are timed; then as many that are watched. Ranks are compared when the run
is over.
"""

import contextlib
import socket
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.bridge import platform
from megatron.bridge.conversion.live_weights import unwrap
from megatron.bridge.mimo.experiments.exchanges import ExchangeLog
from megatron.bridge.mimo.experiments.operations import model_flops
from megatron.bridge.mimo.experiments.ranklog import BACKWARD, FORWARD, RankLog, Span
from megatron.bridge.mimo.module_groups import LANGUAGE
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.peaks import peak_tflops

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.mimo.runtime import MimoRuntime
    from megatron.bridge.training.state import RunState, TrainResult
    from megatron.bridge.training.step import StepResult


class Monitor(Callback):
    """Fills `log`.

    Args:
        warmup: steps before those that are timed.
        timed: steps whose time counts.
        watched: steps after them whose modules and exchanges are watched.
    """

    def __init__(self, warmup: int, timed: int, watched: int) -> None:
        self._first, self._watch_from = warmup, warmup + timed
        self._last = warmup + timed + watched
        self._stamps: list[float] = []
        self._exchanges = ExchangeLog()
        self._watching = contextlib.ExitStack()
        self._items: Counter[str] = Counter()
        self._samples = 0
        self.log = RankLog(socket.gethostname(), [])

    def on_train_start(self, run: "RunState") -> None:
        runtime: MimoRuntime = run.cfg.model.engine.runtime
        names = _names(runtime)
        self.log.modules = [names[name] for name in runtime.model.parts()]

    def on_batch(self, run: "RunState", batch: Any) -> None:
        self._samples += len(batch["tokens"])
        for name, encoder in run.cfg.model.encoders.items():
            self._items[name] += encoder.count((batch.get("modality_inputs") or {}).get(name) or {})

    def on_step_end(self, run: "RunState", result: "StepResult") -> None:
        done = run.progress.iteration
        if not self._first <= done <= self._last:
            return
        platform.synchronize()
        self._stamps.append(time.perf_counter())
        if done == self._watch_from and self._watch_from < self._last:
            self._watch(run)
        if done == self._last:
            self._watching.close()
            self.log.samples, self.log.tokens = result.sequences, result.sequences * run.cfg.model.seq_length

    def on_train_end(self, run: "RunState", result: "TrainResult") -> None:
        log, timed = self.log, self._watch_from - self._first
        log.seconds = [end - begin for begin, end in zip(self._stamps, self._stamps[1 : timed + 1], strict=False)]
        log.watched, log.exchanges = self._stamps[timed:], self._exchanges.exchanges
        log.memory_bytes = platform.peak_memory_bytes()
        items = {name: number / max(self._samples, 1) for name, number in self._items.items()}
        log.flops = model_flops(run.cfg.model, log.samples, items) if platform.is_rank_zero() else None
        dtype = str(run.cfg.model.params_dtype).removeprefix("torch.")
        peak = run.cfg.logger.peak_tflops or peak_tflops(platform.device_name(), dtype)
        log.peak_flops = None if peak is None else peak * 1e12

    def _watch(self, run: "RunState") -> None:
        runtime: MimoRuntime = run.cfg.model.engine.runtime
        names, passes = _names(runtime), _Passes(self.log)
        for name, part in runtime.model.parts().items():
            # Megatron-Core calls `forward` of what wraps a module, past its hooks.
            module = unwrap(part)
            for handle in (
                module.register_forward_pre_hook(partial(passes.forward_begins, names[name])),
                module.register_forward_hook(partial(passes.forward_ends, names[name])),
            ):
                self._watching.callback(handle.remove)
        run.phases.told = self._phase
        self._watching.callback(setattr, run.phases, "told", None)
        self._watching.enter_context(self._exchanges.open())

    def _phase(self, phase: str, begin: float, end: float) -> None:
        self.log.spans.append(Span(phase, None, begin, end))


class _Passes:
    """Writes down when modules go forwards and backwards.

    A backward pass belongs to a module from the moment when the gradient of its output is there until that of the
    module before it is, or until the pass ends.
    """

    def __init__(self, log: RankLog) -> None:
        self._log = log
        self._begun: dict[str, float] = {}
        self._backward: tuple[str, float] | None = None

    def forward_begins(self, name: str, *_: Any) -> None:
        self._begun[name] = _now()

    def forward_ends(self, name: str, module: Any, inputs: Any, output: Any) -> None:
        from torch import Tensor

        self._log.spans.append(Span(FORWARD, name, self._begun.pop(name), _now()))
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(partial(self._gradient_comes, name))

    def _gradient_comes(self, name: str, gradient: "Tensor") -> None:
        from torch.autograd import Variable

        if self._backward is None:
            Variable._execution_engine.queue_callback(self._backward_ends)
        else:
            self._backward_ends()
        self._backward = name, _now()

    def _backward_ends(self) -> None:
        if self._backward is not None:
            name, begun = self._backward
            self._log.spans.append(Span(BACKWARD, name, begun, _now()))
        self._backward = None


def _now() -> float:
    """When what was asked for is done: on a GPU the host runs ahead."""
    platform.synchronize()
    return time.perf_counter()


def _names(runtime: "MimoRuntime") -> dict[str, str]:
    """The modules' names in the placement, by those of the runtime."""
    return {name: runtime.placement.llm_module_name if name == LANGUAGE else name for name in runtime.modules}
