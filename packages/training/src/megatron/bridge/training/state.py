"""What a run holds while it trains, and what it returns."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """

    iteration: int = 0
    consumed_samples: int = 0


@dataclass
class RunState:
    """The parts of a run, built by `setup`. A forward step receives it as its first argument.

    Attributes:
        model: model chunks of this rank (one per virtual pipeline stage), wrapped in Megatron-Core's DDP.
        num_microbatches: forward passes per optimizer step on this rank.
        train_data: one iterator per model chunk.
        valid_dataset: the validation split, None when the run evaluates nothing.
    """

    cfg: "ConfigContainer"
    model: list[Any]
    optimizer: Any
    scheduler: Any
    num_microbatches: int
    train_data: list[Batches]
    valid_dataset: Any = None
    progress: TrainProgress = field(default_factory=TrainProgress)
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        iteration: optimizer steps done, earlier ones before a resume included.
        loss: mean loss per token of the last step; None when no step was left to do.
        losses: iteration -> loss, for the steps of this call.
        grad_norms: iteration -> gradient norm before clipping, for the steps of this call.
        stopped_by: `"train_iters"` when all steps were done, else `"SIGINT"`, `"SIGTERM"` or `"exit_duration"`.
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
