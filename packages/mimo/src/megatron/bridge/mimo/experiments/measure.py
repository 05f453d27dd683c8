"""Runs an experiment on the ranks of its world and measures it. Called on every rank."""

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.bridge.mimo.experiments.experiment import Experiment

if TYPE_CHECKING:
    from megatron.bridge.mimo.model import BridgeMimoModel
    from megatron.bridge.mimo.provider import MimoProvider

# What moves bytes between ranks: its argument that does.
_EXCHANGES = {
    **{"all_reduce": 0, "broadcast": 0, "send": 0, "recv": 0},
    **{"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1},
}


@dataclass(frozen=True)
class Measurement:
    """One rank's figures, per step.

    Attributes:
        modules: on this rank.
        seconds: of a step (median).
        forward_seconds: in the forward passes of each module.
        exchange_seconds, exchange_bytes: in exchanges with other ranks, and what this rank put into them; waiting for a
            peer is part of it. On a GPU exchanges are only begun in this time.
        memory_bytes: the most that was held.
    """

    modules: list[str]
    seconds: float
    forward_seconds: dict[str, float]
    exchange_seconds: float
    exchange_bytes: int
    memory_bytes: int


class _Ledger:
    """Seconds and bytes while it is open."""

    def __init__(self) -> None:
        self.exchange_seconds, self.exchange_bytes = 0.0, 0
        self.forward: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def watching(self, model: "BridgeMimoModel") -> Iterator[None]:
        """Watch torch.distributed and the modules' forward passes."""
        import torch.distributed as dist

        kept: dict[str, Any] = {name: getattr(dist, name) for name in (*_EXCHANGES, "batch_isend_irecv")}
        hooks = []
        for name, module in model.parts().items():
            hooks.append(module.register_forward_pre_hook(partial(self._forward_begins, name)))
            hooks.append(module.register_forward_hook(partial(self._forward_ends, name)))
        for name, place in _EXCHANGES.items():
            setattr(dist, name, self._timed(kept[name], place))
        dist.batch_isend_irecv = self._timed_batch(kept["batch_isend_irecv"])
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name, function in kept.items():
                setattr(dist, name, function)

    def _forward_begins(self, name: str, *_: Any) -> None:
        self.forward[name] -= time.perf_counter() - self.exchange_seconds

    def _forward_ends(self, name: str, *_: Any) -> None:
        # What was exchanged within it is not the module's own.
        self.forward[name] += time.perf_counter() - self.exchange_seconds

    def _timed(self, function: Callable[..., Any], place: int) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.exchange_seconds += time.perf_counter() - started
                if args:
                    self.exchange_bytes += int(args[min(place, len(args) - 1)].nbytes)

        return timed

    def _timed_batch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(operations: Any) -> Any:
            started = time.perf_counter()
            try:
                # They are waited for at once by whoever begins them.
                works = function(operations)
                for work in works:
                    work.wait()
                return works
            finally:
                self.exchange_seconds += time.perf_counter() - started
                self.exchange_bytes += sum(int(each.tensor.nbytes) for each in operations)

        return timed


def measure(experiment: Experiment) -> Measurement:
    """Train random weights on random samples for the experiment's steps. Collective over its world."""
    from megatron.core.optimizer import OptimizerConfig

    from megatron.bridge import platform
    from megatron.bridge.mimo.optimizer import build_optimizer
    from megatron.bridge.mimo.provider import MimoProvider
    from megatron.bridge.mimo.step import forward_step

    runtime = experiment.runtime
    provider = MimoProvider.from_hf_pretrained(experiment.model.hf, experiment.placement())
    provider.load_weights, provider.seq_length = False, runtime.seq_length
    (model,) = provider.provide_distributed_model()
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-4, bf16=provider.bf16))
    model.config.grad_scale_func = optimizer.scale_loss
    run, batch = provider.engine.runtime, _batch(experiment, provider)

    def step() -> float:
        platform.barrier()
        started = time.perf_counter()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        data = iter([batch] * runtime.num_microbatches)
        run.forward_backward(
            forward_step,
            data,
            runtime.num_microbatches,
            seq_length=runtime.seq_length,
            micro_batch_size=len(batch["tokens"]),
        )
        optimizer.step()
        platform.synchronize()
        return time.perf_counter() - started

    for _ in range(runtime.warmup_steps):
        step()
    ledger = _Ledger()
    watching = ledger.watching(model) if runtime.enable_performance_monitoring else contextlib.nullcontext()
    with watching:
        seconds = [step() for _ in range(runtime.steps)]
    names = {name: experiment.model.llm_module_name if name == "language" else name for name in model.parts()}
    found = Measurement(
        modules=list(names.values()),
        seconds=statistics.median(seconds),
        forward_seconds={names[name]: total / runtime.steps for name, total in ledger.forward.items()},
        exchange_seconds=ledger.exchange_seconds / runtime.steps,
        exchange_bytes=ledger.exchange_bytes // runtime.steps,
        memory_bytes=platform.peak_memory_bytes(),
    )
    provider.engine.stop()
    return found


def _batch(experiment: Experiment, provider: "MimoProvider") -> dict[str, Any]:
    """One micro-batch of this rank: random text, an image of the encoder's own in every sample."""
    import torch

    from megatron.bridge.mimo.slices import loading_place

    runtime = experiment.runtime
    _, size = loading_place(provider.engine.runtime.modules)
    samples = runtime.base_batch_size * provider.llm_layout.data_parallel // size
    ((name, encoder),) = provider.encoders.items()
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, min(encoder.token_id, provider.vocab_size), (samples, runtime.seq_length), generator=draw)
    tokens[:, : runtime.image_tokens] = encoder.token_id
    images = {key: torch.cat([value] * samples) for key, value in encoder.ghost().items()}
    return {
        "tokens": tokens,
        "labels": tokens.clamp(max=provider.vocab_size - 1),
        "loss_mask": (tokens != encoder.token_id).float(),
        "position_ids": torch.arange(runtime.seq_length).expand(samples, -1).contiguous(),
        "modality_inputs": {name: images},
    }
