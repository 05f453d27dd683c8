"""The training loop."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge import platform
from megatron.bridge.training.evaluate import evaluate_and_print_results
from megatron.bridge.training.hf_side import save_hf
from megatron.bridge.training.parameter_sync import whole_parameters
from megatron.bridge.training.reporter import Reporter
from megatron.bridge.training.saving import Saver
from megatron.bridge.training.state import TrainResult
from megatron.bridge.training.step import train_step
from megatron.bridge.training.stop import StopRequest

if TYPE_CHECKING:
    from megatron.bridge.training.state import RunState


def train(run: "RunState", forward_step: Any) -> TrainResult:
    """Step, report, evaluate and save until all steps are done or something asks to stop. Collective.

    Args:
        run: from `setup`.
        forward_step: `(run, data_iterator, model) -> (output, loss function)`, e.g. `gpt_step.forward_step`.

    Raises:
        NotFinite: the loss or the gradient became NaN or infinite; the checkpoints saved before stay.
    """
    settings, progress = run.cfg.train, run.progress
    losses: dict[int, float] = {}
    norms: dict[int, float] = {}
    valid_loss: float | None = None
    stopped_by: str | None = None
    with (
        StopRequest(settings.exit_signal_handler, settings.exit_duration_in_mins) as stop,
        Reporter(run.cfg, progress.iteration, platform.is_rank_zero(), run.logger_states) as reporter,
        Saver(run, reporter) as saver,
    ):
        run.train_data = [run.callbacks.watched(run, data) for data in run.train_data]
        for notice in run.notices:
            reporter.message(notice)
        run.callbacks.on_train_start(run)
        while progress.iteration < settings.train_iters and stopped_by is None:
            result = train_step(run, forward_step)
            progress.iteration += 1
            progress.consumed_samples += settings.global_batch_size
            losses[progress.iteration], norms[progress.iteration] = result.loss, result.grad_norm
            reporter.step(progress.iteration, result)
            run.callbacks.on_step_end(run, result)
            if _due(settings.eval_interval, progress.iteration):
                valid_loss = evaluate_and_print_results(run, forward_step, reporter)
            stopped_by = stop.reason(asked=run.stop_requested is not None)
            done = progress.iteration == settings.train_iters or stopped_by is not None
            saver.look()
            if _saves(run) and (done or _due(run.cfg.checkpoint.save_interval, progress.iteration)):
                run.logger_states = reporter.states()
                saver.save(last=done)
        with whole_parameters(run.model):
            pass  # the caller may go on to use the model
        if stopped_by is None and run.cfg.checkpoint.hf_save_path is not None:
            reporter.message(f"Hugging Face model {save_hf(run)}")
        if stopped_by is not None:
            reporter.message(
                _how_to_resume(run.stop_requested or stopped_by, progress.iteration, settings.train_iters, saver.newest)
            )
    ended = TrainResult(
        iteration=progress.iteration,
        loss=losses.get(progress.iteration),
        losses=losses,
        grad_norms=norms,
        stopped_by=stopped_by or "train_iters",
        checkpoint=saver.newest,
        valid_loss=valid_loss,
    )
    run.callbacks.on_train_end(run, ended)
    return ended


def _due(interval: int | None, iteration: int) -> bool:
    return interval is not None and iteration % interval == 0


def _saves(run: "RunState") -> bool:
    return run.cfg.checkpoint.save is not None


def _how_to_resume(reason: str, iteration: int, last: int, saved: Path | None) -> str:
    where = f"stopped by {reason} after step {iteration} of {last}; "
    if saved is None:
        return where + "nothing was saved (checkpoint.save is not set)"
    return where + f"resume with checkpoint.load={saved.parent} (the same command, with this setting)"
