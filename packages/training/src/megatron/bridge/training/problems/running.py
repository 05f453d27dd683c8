"""What is wrong with how a run is watched, and with what it does about faults."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.problems.files import refused_folder
from megatron.bridge.training.problems.lengths import has_length
from megatron.bridge.training.profiler import profiling_problems
from megatron.bridge.training.secrets import secret_problems

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def profiled_step_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """Steps to profile that the run does not have."""
    if has_length(cfg):
        yield from profiling_problems(cfg)


def fault_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """Settings about faults that contradict each other."""
    settings = cfg.fault_tolerance
    for name in ("rerun_tolerance", "max_skips_in_a_row"):
        if getattr(settings, name) < 0:
            yield f"fault_tolerance.{name}={getattr(settings, name)} must not be negative"
    for name in ("check_for_nan_in_grad", "check_for_large_grads"):
        if settings.on_fault != "stop" and getattr(cfg.ddp, name):
            yield (
                f"ddp.{name}=True ends the run at once on the rank concerned, and fault_tolerance.on_fault is "
                f"{settings.on_fault!r}; leave ddp.{name} out"
            )
    if settings.on_fault != "rerun" and (settings.after_rerun != "stop" or settings.rerun_tolerance):
        yield "fault_tolerance.after_rerun and rerun_tolerance belong to on_fault='rerun'; set it, or leave them out"


def logger_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """Loggers that lack a package, a setting or a folder."""
    from megatron.bridge.training.reporter import loggers_of

    for name in ("folder", "tensorboard_dir", "wandb_save_dir"):
        path = getattr(cfg.logger, name)
        if path is not None and (why := refused_folder(Path(path))) is not None:
            yield f"logger.{name}={path!r} cannot be written: {why}"
    factor = cfg.logger.straggler_factor
    if factor is not None and factor <= 1:
        yield f"logger.straggler_factor={factor} must be greater than 1; 1.2 tells of ranks that take 20% longer"
    try:
        wanted = list(loggers_of(cfg))
    except BridgeError as error:
        yield f"logger.loggers: {error}"
        return
    for name, logger in wanted:
        if logger.needs is not None and importlib.util.find_spec(logger.needs[0]) is None:
            package, extra = logger.needs
            yield (
                f"the logger {name!r} needs the package {package}, which is not there: "
                f"uv pip install 'megatron-bridge-training[{extra}]'"
            )
        if logger.setting is not None and not logger.wanted(cfg):
            yield f"logger.loggers names {name!r}, which needs logger.{logger.setting}; set it, or leave {name!r} out"
    for name in cfg.logger.options.keys() - {name for name, _ in wanted}:
        yield f"logger.options has settings for {name!r}, which is none of the run's loggers; add it to logger.loggers"


def backend_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """What needs a GPU, or Transformer Engine, where there is none."""
    from megatron.bridge.platform import cuda_available

    if cfg.dist.distributed_backend == "nccl" and not cuda_available():
        yield "dist.distributed_backend='nccl' needs a GPU, and there is none; leave it out, or use 'gloo'"
    if cfg.rng.te_rng_tracker and importlib.util.find_spec("transformer_engine") is None:
        yield "rng.te_rng_tracker=True needs Transformer Engine, which is not there; leave it out"


def written_secret_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """Secrets in the configuration, which is saved beside every checkpoint."""
    from megatron.bridge.training.config_origins import values_of

    yield from secret_problems((each.key, each.value) for each in values_of(cfg))
