"""Evaluation: the mean loss per token over a fixed part of the validation split."""

from typing import TYPE_CHECKING, Any

from megatron.bridge.training.data import batches_per_chunk
from megatron.bridge.training.fault_tolerance import NotFinite
from megatron.bridge.training.step import forward_backward, global_loss
from megatron.bridge.training.tally import Tally

if TYPE_CHECKING:
    from megatron.bridge.training.reporter import Reporter
    from megatron.bridge.training.state import RunState


def evaluate(run: "RunState", forward_step: Any) -> float:
    """Mean loss per token over `train.eval_iters` global batches: the same samples each time. Collective."""
    import torch

    sequences = run.cfg.train.global_batch_size
    data = batches_per_chunk(run.cfg, run.valid_dataset, len(run.model), sequences)
    num_microbatches = run.num_microbatches(sequences)
    total, counted = 0.0, 0
    for chunk in run.model:
        chunk.eval()
    try:
        with torch.no_grad():
            for _ in range(run.cfg.train.eval_iters):
                reports = forward_backward(run, forward_step, data, num_microbatches, training=False)
                # What fills up the last batch of a small split counts nothing.
                loss, tokens = global_loss(run, reports, run.progress.iteration, may_be_empty=True)
                total, counted = total + loss * tokens, counted + tokens
    finally:
        for chunk in run.model:
            chunk.train()
    if counted == 0:
        raise NotFinite("no token of the validation split counts for the loss: its loss mask is all zeros")
    return total / counted


def evaluate_and_print_results(run: "RunState", forward_step: Any, reporter: "Reporter") -> float:
    """`evaluate`, reported on rank 0."""
    training, run.tally = run.tally, Tally(*run.tally.names)
    loss = evaluate(run, forward_step)
    reporter.metrics(run.progress.iteration, {"valid_loss": loss} | run.tally.means("valid_"))
    run.tally = training
    run.callbacks.on_evaluate_end(run, loss)
    return loss
