"""What a run holds while it trains, and what it returns."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge import platform
from megatron.bridge.training.callbacks import Callbacks
from megatron.bridge.training.engine import Engine, engine_of
from megatron.bridge.training.fault_tolerance import Guard
from megatron.bridge.training.flops import step_flops
from megatron.bridge.training.phases import Phases
from megatron.bridge.training.tally import Tally

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.training.config import ConfigContainer

type Batches = Iterator[dict[str, Tensor]] | None


@dataclass
class TrainProgress:
    """How far a run is; saved with every checkpoint.

    Attributes:
        iteration: optimizer steps done.
        consumed_samples: training sequences drawn, over all ranks.
        stream_states: by data-parallel rank, where data stand that load themselves.
    """

    iteration: int = 0
    consumed_samples: int = 0
    stream_states: Sequence[bytes] = ()


@dataclass
class RunState:
    """The parts of a run, built by `setup`. A forward step receives it as its first argument.

    Attributes:
        model: model chunks of this rank (one per virtual pipeline stage), wrapped in Megatron-Core's DDP.
        train_data: one iterator per model chunk.
        streams: the same without what callbacks put around them.
        valid_dataset: the validation split, None when the run evaluates nothing.
        logger_states: what the loggers said of themselves in the last checkpoint.
        stop_requested: why a callback wants the run to end.
        notices: what is to be told when the loop starts.
        phases: where the time of the steps goes.
        tally: what the loss function tells besides the loss.
        guard: watches for steps that go wrong.
    """

    cfg: "ConfigContainer"
    model: list[Any]
    optimizer: Any
    scheduler: Any
    train_data: list[Batches]
    valid_dataset: Any = None
    streams: list[Batches] = field(default_factory=list)
    progress: TrainProgress = field(default_factory=TrainProgress)
    callbacks: Callbacks = field(default_factory=lambda: Callbacks(()))
    logger_states: dict[str, dict[str, Any]] = field(default_factory=dict)
    stop_requested: str | None = None
    notices: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    phases: Phases = field(default_factory=Phases)
    tally: Tally = field(default_factory=Tally)
    guard: Guard = field(init=False)

    def __post_init__(self) -> None:
        self.guard = Guard(self.cfg.fault_tolerance, scaled=self.cfg.model.fp16)

    @cached_property
    def flops_per_sequence(self) -> float | None:
        """Operations that a training sequence takes; None where they are not known."""
        return step_flops(self.cfg.model, 1)

    @cached_property
    def engine(self) -> Engine:
        """What knows the model's layout."""
        return engine_of(self.cfg)

    @property
    def batch_size(self) -> int:
        """Sequences of the step to come, over all ranks."""
        return self.cfg.train.batch_sizes.at(self.progress.consumed_samples)

    def num_microbatches(self, sequences: int) -> int:
        """Forward passes on this rank in a step of so many sequences."""
        replicas = self.engine.replicas(self.cfg, platform.world_size())
        return sequences // (self.cfg.train.micro_batch_size * replicas)

    def request_stop(self, why: str) -> None:
        """End the run after the step in progress, with a checkpoint where one is configured; `why` is reported."""
        self.stop_requested = self.stop_requested or why


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        iteration: optimizer steps done, earlier ones before a resume included.
        loss: mean loss per token of the last step; None when no step was left to do.
        losses: iteration -> loss, for the steps of this call.
        grad_norms: iteration -> gradient norm before clipping, for the steps of this call.
        stopped_by: `"train_iters"` when all steps were done, else `"SIGINT"`, `"SIGTERM"`, `"exit_duration"`,
            `"exit_interval"` or `"callback"`; `"skip_train"` where none was to be done.
        checkpoint: the last checkpoint written, None when none was.
        valid_loss: mean loss per token of the last evaluation, None without one.
    """

    iteration: int
    loss: float | None
    losses: dict[int, float]
    grad_norms: dict[int, float]
    stopped_by: str
    checkpoint: Path | None
    valid_loss: float | None
