"""One optimizer step: the schedule's forward and backward passes, the loss over all ranks, the update."""

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.bridge import platform
from megatron.bridge.training.auxiliary_losses import forget_last_step
from megatron.bridge.training.fault_tolerance import Gradients, NotFinite
from megatron.bridge.training.gpt_step import LOSS

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.training.state import Batches, RunState


@dataclass(frozen=True)
class StepResult:
    """One step over all ranks.

    Attributes:
        loss: mean over the tokens of the global batch.
        tokens: tokens that the loss counts.
        grad_norm: before clipping.
        learning_rate: used in this step.
        skipped: the update was skipped, because the fp16 loss scale was too high or by the policy for faults.
        sequences: of the global batch.
        told: what went wrong in the step and what was done about it; None where nothing did.
    """

    loss: float
    tokens: int
    grad_norm: float
    learning_rate: float
    skipped: bool
    sequences: int
    told: str | None = None


def train_step(run: "RunState", forward_step: Any) -> StepResult:
    """Do one step and move the schedule on; `run.progress` is left to the caller. Collective.

    Raises:
        StepFault: NaN or infinity in the loss (the weights are then as before the step) or in the gradient, or a loss
            that leaps; where `fault_tolerance` does not say otherwise.
    """
    learning_rate, sequences = _learning_rate(run.optimizer), run.batch_size
    with run.phases.step():
        verdict = run.guard.watched(run, partial(compute_gradients, run, forward_step))
        found = verdict.gradients
        updated, grad_norm = _update(run, found.loss) if verdict.update else (False, 0.0)
        run.scheduler.step(sequences)
    return StepResult(found.loss, found.tokens, grad_norm, learning_rate, not updated, sequences, verdict.told)


def compute_gradients(run: "RunState", forward_step: Any, data: list["Batches"]) -> Gradients:
    """A step's forward and backward passes over `data`; the gradients are reduced and wait in the buffers. Collective.

    Raises:
        NotFinite: the loss is; only where no policy waits for it.
    """
    for chunk in run.model:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    forget_last_step()
    with run.phases("forward_backward"):
        reports = forward_backward(run, forward_step, data, run.num_microbatches(run.batch_size), training=True)
    run.callbacks.on_gradients(run)
    loss, tokens, own = reduced_loss(run, reports, run.progress.iteration + 1)
    if not run.guard.awake:
        check_finite(loss, own, run.progress.iteration + 1)
    return Gradients(loss, tokens, own)


def finish_gradients(run: "RunState", *arguments: Any, **settings: Any) -> None:
    """Reduce the gradients of all micro-batches, as Megatron-Core's schedule asks for when it has them."""
    if run.phases.told_apart:
        # The device may still be computing what the host has asked for.
        platform.synchronize()
    with run.phases("gradient_sync"):
        _reduce(run, *arguments, **settings)


def _reduce(run: "RunState", *arguments: Any, **settings: Any) -> None:
    # Where reduction overlaps with the backward pass, it has begun already.
    overlapped = run.cfg.ddp.overlap_grad_reduce
    if not overlapped:
        run.guard.look_at_gradients(run.engine.gradient_buffers(run.model))
    run.engine.finish_gradients(*arguments, **settings)
    if overlapped:
        run.guard.look_at_gradients(run.engine.gradient_buffers(run.model))


def _update(run: "RunState", loss: float) -> tuple[bool, float]:
    """Let the optimizer step; whether it did, and the norm of the gradient before clipping."""
    with run.phases("optimizer"):
        updated, grad_norm, _ = run.optimizer.step()
    if not updated and run.optimizer.get_loss_scale().item() == 1.0:
        raise NotFinite(f"the optimizer refused the update of iteration {run.progress.iteration + 1}")
    if updated and not math.isfinite(grad_norm):
        raise NotFinite(
            f"the gradient norm is {grad_norm} at iteration {run.progress.iteration + 1}, although the loss is {loss}; "
            "resume from the last checkpoint with a lower optimizer.lr or in fp32"
        )
    return updated, float(grad_norm or 0.0)


def forward_backward(
    run: "RunState", forward_step: Any, data: list["Batches"], num_microbatches: int, *, training: bool
) -> list[dict[str, "Tensor"]]:
    """Run Megatron-Core's schedule for this layout; the loss reports of each micro-batch, on the last stage only."""
    return run.engine.schedule()(
        forward_step_func=partial(forward_step, run),
        data_iterator=data if len(run.model) > 1 else data[0],
        model=run.model,
        num_microbatches=num_microbatches,
        seq_length=run.cfg.model.seq_length,
        micro_batch_size=run.cfg.train.micro_batch_size,
        forward_only=not training,
    )


def global_loss(
    run: "RunState", reports: list[dict[str, "Tensor"]], iteration: int, *, may_be_empty: bool = False
) -> tuple[float, int]:
    """Mean loss per token over all micro-batches and data-parallel ranks, and the number of tokens; on every rank.

    `may_be_empty`: no token at all is a loss of 0, not an error.

    Raises:
        NotFinite: (on every rank) the loss is NaN or infinite; names the ranks where it is.
    """
    loss, tokens, own = reduced_loss(run, reports, iteration, may_be_empty=may_be_empty)
    check_finite(loss, own, iteration)
    return loss, tokens


def reduced_loss(
    run: "RunState", reports: list[dict[str, "Tensor"]], iteration: int, *, may_be_empty: bool = False
) -> tuple[float, int, float]:
    """As `global_loss`, whatever the loss is; and the sum of losses that this rank adds to it.

    Raises:
        NotFinite: (on every rank) no token counts.
    """
    import torch

    from megatron.bridge.platform import device

    totals = torch.zeros(2, dtype=torch.float64, device=device())
    for report in reports:
        totals += report[LOSS]
    own = float(totals[0])
    total, tokens = run.engine.total(totals).tolist()
    if tokens == 0 and not may_be_empty:
        raise NotFinite(f"no token of iteration {iteration} counts for the loss: its loss mask is all zeros")
    return total / max(tokens, 1), int(tokens), own


def check_finite(loss: float, own: float, iteration: int) -> None:
    """Raise `NotFinite` for a loss that is not, naming the ranks whose `own` part of it is not. Collective then."""
    if not math.isfinite(loss):
        raise NotFinite(_where(math.isfinite(own), loss, iteration))


def _where(healthy: bool, total: float, iteration: int) -> str:
    # Every rank of the world has seen the sum only if every pipeline has it: replicas share the sum over their group.
    from megatron.bridge.conversion.rank_agreement import gather

    ranks = [str(rank) for rank, fine in enumerate(gather(healthy)) if not fine]
    return (
        f"the loss is {total} at iteration {iteration} on rank {', '.join(ranks)}; the weights are those of iteration "
        f"{iteration - 1}. Look at the data of this step, lower optimizer.lr, or train in fp32"
    )


def _learning_rate(optimizer: Any) -> float:
    from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

    rate = get_canonical_lr_for_logging(optimizer.param_groups)
    return float(rate) if rate is not None else 0.0
