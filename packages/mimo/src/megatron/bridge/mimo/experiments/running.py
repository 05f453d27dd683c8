"""Runs experiments one after another, each in ranks of its own, or on the ranks that torchrun started."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.experiments.experiment import Experiment
from megatron.bridge.mimo.experiments.figures import RunFigures
from megatron.bridge.mimo.experiments.ranklog import RankLog


@dataclass(frozen=True)
class Outcome:
    """An experiment, and what came of it: figures, or why there are none."""

    experiment: Experiment
    figures: RunFigures | None
    error: str | None = None


def measured(experiment: Experiment) -> RankLog:
    """Train the experiment's model for its steps, on every rank of its world. Collective.

    Raises:
        BridgeError: a step failed, or something stopped the run before its end.
    """
    from megatron.bridge.mimo.experiments.monitor import Monitor
    from megatron.bridge.mimo.mimo_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    runtime, cfg = experiment.runtime, experiment.configured()
    monitor = Monitor(runtime.warmup_steps, runtime.steps, experiment.watched_steps)
    ended = pretrain(cfg, forward_step, [monitor])
    if ended.iteration != cfg.train.train_iters:
        raise BridgeError(f"stopped by {ended.stopped_by} after step {ended.iteration} of {cfg.train.train_iters}")
    return monitor.log


def run_here(experiments: Sequence[Experiment], timeout: float, tell: Callable[[str], None]) -> list[Outcome]:
    """Run each in ranks forked from this process, which has imported what they need.

    Args:
        experiments: checked.
        timeout: seconds for each; then its ranks are killed.
        tell: called with a line when an experiment begins, or has failed.
    """
    from megatron.bridge.platform.launch import run_ranks, share_of_cores

    _import_for_ranks(experiments)
    outcomes = []
    for each in experiments:
        tell(f"{each.name}: {each.mode}, {each.ranks} rank{'s' * (each.ranks != 1)}")
        try:
            logs = run_ranks(each.ranks, measured, each, timeout=timeout, threads=share_of_cores(each.ranks))
            outcomes.append(Outcome(each, RunFigures(logs)))
        except BridgeError as error:
            tell(f"{each.name} failed: {error}")
            outcomes.append(Outcome(each, None, str(error)))
    return outcomes


def _import_for_ranks(experiments: Sequence[Experiment]) -> None:
    """Import here what the ranks will: each of them would take as long as this process alone."""
    import megatron.bridge.mimo.experiments.monitor
    import megatron.bridge.training.setup
    import megatron.bridge.training.train  # noqa: F401
    from megatron.bridge.mimo.experiments.operations import item_flops

    for each in {each.recipe: each for each in experiments}.values():
        provider = each.configured().model
        for encoder in provider.encoders.values():
            item_flops(encoder, provider)  # builds it without its weights


def run_as_rank(experiments: Sequence[Experiment], timeout: float, tell: Callable[[str], None]) -> list[Outcome]:
    """Run each as one of the ranks that a launcher started. Collective; every rank has the outcomes.

    After a failure no further one is run: ranks may have been left in the middle of an exchange.

    Args:
        experiments: checked for this world.
        timeout: seconds that a collective waits for an absent rank.
        tell: called on rank 0.
    """
    from megatron.bridge import platform
    from megatron.bridge.conversion.rank_agreement import gather, reason

    platform.initialize_distributed(timeout)
    outcomes: list[Outcome] = []
    for each in experiments:
        if platform.is_rank_zero():
            tell(f"{each.name}: {each.mode}, {each.ranks} ranks")
        try:
            outcomes.append(Outcome(each, RunFigures(gather(measured(each)))))
        except Exception as error:
            outcomes.append(Outcome(each, None, reason(error)))
            break
    left = experiments[len(outcomes) :]
    return [*outcomes, *(Outcome(each, None, "not run, after the failure of the one before") for each in left)]
