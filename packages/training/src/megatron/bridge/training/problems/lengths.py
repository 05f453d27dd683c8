"""What is wrong with how long a run is, and with numbers that must be positive."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron.bridge.training.batch_sizes import ramp_problem

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def size_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """Numbers that must be greater than 0."""
    positive = {
        "train.train_iters": cfg.train.train_iters,
        "train.train_samples": cfg.train.train_samples,
        "train.global_batch_size": cfg.train.global_batch_size,
        "train.micro_batch_size": cfg.train.micro_batch_size,
        "train.eval_interval": cfg.train.eval_interval,
        "train.eval_iters": cfg.train.eval_iters,
        "train.exit_duration_in_mins": cfg.train.exit_duration_in_mins,
        "train.exit_interval": cfg.train.exit_interval,
        "scheduler.lr_decay_samples": cfg.scheduler.lr_decay_samples,
        "logger.log_interval": cfg.logger.log_interval,
        "logger.peak_tflops": cfg.logger.peak_tflops,
        "checkpoint.save_interval": cfg.checkpoint.save_interval,
        "checkpoint.most_recent_k": cfg.checkpoint.most_recent_k,
        "fault_tolerance.loss_spike_threshold": cfg.fault_tolerance.loss_spike_threshold,
        "fault_tolerance.loss_spike_window": cfg.fault_tolerance.loss_spike_window,
        "dist.timeout_seconds": cfg.dist.timeout_seconds,
    }
    for name, value in positive.items():
        if value is not None and value <= 0:
            yield f"{name}={value} must be greater than 0"


def has_length(cfg: "ConfigContainer") -> bool:
    """Whether the number and sizes of the steps are known; what follows from them can then be checked too."""
    return cfg.train.global_batch_size > 0 and not any(length_problems(cfg))


def length_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """What is wrong with the run's length and the sizes of its steps."""
    train = cfg.train
    if train.global_batch_size <= 0:
        return
    ramp = train.rampup_batch_size
    problem = None if ramp is None else ramp_problem(train.global_batch_size, ramp)
    if problem is not None:
        yield problem
    elif train.train_iters is None and train.train_samples is None:
        yield "neither train.train_iters nor train.train_samples is set: say how long to train"
    elif train.train_iters is not None and train.train_samples is not None:
        yield "train.train_iters and train.train_samples are both set; set one of them to null"
    elif train.total_iters == 0 and (train.train_samples or 0) > 0:
        yield (
            f"train.train_samples={train.train_samples} is less than the first step takes, {train.batch_sizes.at(0)}"
        )
    if train.skip_train and train.eval_interval is None:
        yield "train.skip_train=True leaves the evaluation, and train.eval_interval is not set: there is nothing to do"
