"""The training loop."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge import platform
from megatron.bridge.training.auxiliary_losses import auxiliary_losses
from megatron.bridge.training.evaluate import evaluate_and_print_results
from megatron.bridge.training.parameter_sync import whole_parameters
from megatron.bridge.training.performance import performance
from megatron.bridge.training.profiler import Profiler
from megatron.bridge.training.reporter import Reporter
from megatron.bridge.training.saving import Saver
from megatron.bridge.training.state import TrainResult
from megatron.bridge.training.step import train_step
from megatron.bridge.training.stop import StopRequest

if TYPE_CHECKING:
    from megatron.bridge.training.state import RunState
    from megatron.bridge.training.step import StepResult


def train(run: "RunState", forward_step: Any) -> TrainResult:
    """Step, report, evaluate and save until all steps are done or something asks to stop. Collective.

    Args:
        run: from `setup`.
        forward_step: `(run, data_iterator, model) -> (output, loss function)`, e.g. `gpt_step.forward_step`.

    Raises:
        StepFault: the loss or the gradient became NaN or infinite, or the loss leapt; checkpoints saved before stay.
    """
    settings, progress, last = run.cfg.train, run.progress, run.cfg.train.total_iters
    losses: dict[int, float] = {}
    norms: dict[int, float] = {}
    valid_loss: float | None = None
    stopped_by: str | None = None
    with (
        StopRequest(settings.exit_signal_handler, settings.exit_duration_in_mins) as stop,
        Reporter(run.cfg, progress.iteration, platform.is_rank_zero(), run.logger_states) as reporter,
        Saver(run, reporter) as saver,
        Profiler(run.cfg, run.phases) as profiler,
    ):
        run.train_data = [run.callbacks.watched(run, data) for data in run.train_data]
        for notice in run.notices:
            reporter.message(notice)
        run.callbacks.on_train_start(run)
        if settings.skip_train:
            valid_loss, last = evaluate_and_print_results(run, forward_step, reporter), progress.iteration
        while progress.iteration < last and stopped_by is None:
            run.phases.told_apart = reporter.due(progress.iteration + 1) or run.cfg.logger.straggler_factor is not None
            with profiler.step(progress.iteration):
                result = train_step(run, forward_step)
            progress.iteration += 1
            progress.consumed_samples += result.sequences
            losses[progress.iteration], norms[progress.iteration] = result.loss, result.grad_norm
            reporter.step(progress.iteration, result, partial(_others, run, result, reporter))
            if result.told is not None:
                reporter.message(result.told)
            run.callbacks.on_step_end(run, result)
            if _due(settings.eval_interval, progress.iteration):
                valid_loss = evaluate_and_print_results(run, forward_step, reporter)
            stopped_by = stop.reason(asked=run.stop_requested is not None)
            if stopped_by is None and progress.iteration < last and _due(settings.exit_interval, progress.iteration):
                stopped_by = "exit_interval"
            done = progress.iteration == last or stopped_by is not None
            saver.look()
            if _saves(run) and (done or _due(run.cfg.checkpoint.save_interval, progress.iteration)):
                run.logger_states = reporter.states()
                saver.save(last=done)
        with whole_parameters(run.model):
            pass  # the caller may go on to use the model
        if stopped_by is not None:
            reporter.message(_how_to_resume(run.stop_requested or stopped_by, progress.iteration, last, saver.newest))
    ended = TrainResult(
        iteration=progress.iteration,
        loss=losses.get(progress.iteration),
        losses=losses,
        grad_norms=norms,
        stopped_by=stopped_by or ("skip_train" if settings.skip_train else "train_iters"),
        checkpoint=saver.newest,
        valid_loss=valid_loss,
    )
    run.callbacks.on_train_end(run, ended)
    return ended


def _others(run: "RunState", result: "StepResult", reporter: Reporter) -> dict[str, float]:
    """What is told of a logged step besides its result. Collective."""
    found = performance(run, result.sequences)
    for line in found.stragglers:
        reporter.message(line)
    return auxiliary_losses(run, run.num_microbatches(result.sequences)) | run.tally.means() | found.metrics


def _due(interval: int | None, iteration: int) -> bool:
    return interval is not None and iteration % interval == 0


def _saves(run: "RunState") -> bool:
    return run.cfg.checkpoint.save is not None


def _how_to_resume(reason: str, iteration: int, last: int, saved: Path | None) -> str:
    where = f"stopped by {reason} after step {iteration} of {last}; "
    if saved is None:
        return where + "nothing was saved (checkpoint.save is not set)"
    return where + f"resume with checkpoint.load={saved.parent} (the same command, with this setting)"
