"""What is wrong with a configuration, all of it at once, before anything heavy is built."""

from typing import TYPE_CHECKING

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.comm_overlap import apply_overlap, engine_problems, overlap_problems
from megatron.bridge.training.forward_steps import forward_step_problems
from megatron.bridge.training.launching.base import EVERYTHING, Sight
from megatron.bridge.training.mixed_precision import apply_precision, precision_problems
from megatron.bridge.training.peft_section import peft_problems
from megatron.bridge.training.problems.data import data_problems
from megatron.bridge.training.problems.files import checkpoint_problems
from megatron.bridge.training.problems.layout import layout_problems
from megatron.bridge.training.problems.lengths import length_problems, size_problems
from megatron.bridge.training.problems.model import model_problems
from megatron.bridge.training.problems.running import (
    backend_problems,
    fault_problems,
    logger_problems,
    profiled_step_problems,
    written_secret_problems,
)
from megatron.bridge.training.problems.schedule import optimizer_problems, scheduler_problems
from megatron.bridge.training.profiler import machine_problems, rank_problems

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


class ConfigError(BridgeError):
    """A configuration cannot run, or an override cannot be applied."""


def validate(cfg: "ConfigContainer", world_size: int | None = None, sight: Sight = EVERYTHING) -> None:
    """Raise one `ConfigError` that lists every problem of `cfg`; see `ConfigContainer.validate`."""
    if world_size is None:
        from megatron.bridge import platform

        world_size = platform.world_size()
    try:
        apply_precision(cfg)
        apply_overlap(cfg)
        _apply_evaluation(cfg)
    except BridgeError as error:
        raise ConfigError(str(error)) from error
    checks = [*_CHECKS, *(check for what, those in _CHECKS_BY_SIGHT.items() if what in sight for check in those)]
    found = [problem for check in checks for problem in check(cfg)]
    found += [*layout_problems(cfg, world_size), *rank_problems(cfg, world_size)]
    if found:
        raise ConfigError(report("the configuration cannot run", found))


def _apply_evaluation(cfg: "ConfigContainer") -> None:
    """The section `validation` decides about the fields of `train` that say the same."""
    for name in ("eval_interval", "eval_iters"):
        value = getattr(cfg.validation, name)
        if value is not None:
            setattr(cfg.train, name, value)


def report(headline: str, problems: list[str]) -> str:
    """One problem on one line; several as a list under a headline."""
    if len(problems) == 1:
        return f"{headline}: {problems[0]}"
    return f"{headline}, {len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)


_CHECKS = (
    size_problems,
    length_problems,
    model_problems,
    optimizer_problems,
    scheduler_problems,
    fault_problems,
    profiled_step_problems,
    overlap_problems,
    written_secret_problems,
    peft_problems,
    forward_step_problems,
)


# What can be proven only where the run's files, or the machine that it runs on, are.
_CHECKS_BY_SIGHT = {
    "files": (data_problems, checkpoint_problems, logger_problems),
    "machine": (precision_problems, machine_problems, engine_problems, backend_problems),
}
