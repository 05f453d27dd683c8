"""Logits of a Megatron model at any layout, for comparison with another implementation."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.context_chunks import in_order, part_of_rank
from megatron.bridge.conversion.live import Model
from megatron.bridge.conversion.live_weights import Layout, as_chunks
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import torch


def megatron_logits(
    model: Model, input_ids: "torch.Tensor", inputs: "Sequence[Mapping[str, torch.Tensor]]" = ()
) -> "torch.Tensor":
    """Run a forward pass; every rank returns the whole result. Collective over the model's ranks.

    Args:
        model: chunks of this rank, wrapped or not.
        input_ids: token ids [batch, sequence], the same on every rank.
        inputs: per row, what the model takes besides (images), the same on every rank.

    Returns:
        Logits [batch, sequence, vocabulary] in float32, padding columns included; of a headed model
        [batch, sequence, labels].
    """
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    chunks = as_chunks(model)
    layout = Layout.of(chunks)
    if layout.context_size > 1 and input_ids.shape[1] % (2 * layout.context_size):
        raise BridgeError(
            f"{input_ids.shape[1]} tokens cannot be divided over {layout.context_size} context-parallel ranks; give a "
            f"multiple of {2 * layout.context_size}"
        )
    was_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    # One row per micro-batch: interleaved stages want a multiple of the pipeline's depth.
    rows = list(zip(input_ids.split(1), inputs or [{}] * input_ids.shape[0], strict=True))
    rows += rows[:1] * (-len(rows) % layout.pipeline_size)
    with torch.no_grad():
        collected = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, layout),
            data_iterator=[iter(rows) for _ in chunks] if len(chunks) > 1 else iter(rows),
            model=chunks,
            num_microbatches=len(rows),
            seq_length=input_ids.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    for chunk, training in zip(chunks, was_training, strict=True):
        chunk.train(training)
    gathered = not getattr(chunks[-1], "parallel_output", True)
    return _everywhere(collected, layout, input_ids, gathered)


def _forward_step(layout: Layout, rows: "Iterator[tuple[torch.Tensor, Mapping[str, torch.Tensor]]]", chunk: Any) -> Any:
    import torch

    tokens, inputs = next(rows)
    if getattr(chunk, "xattn_needed", False):  # an encoder-decoder; its decoder reads the same tokens
        return chunk(tokens, tokens, None, None, None), lambda output, non_loss_data: output
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    if layout.context_size > 1:
        place = layout.context_group.rank(), layout.context_size
        tokens, positions = (part_of_rank(whole, *place, axis=1) for whole in (tokens, positions))
    return chunk(tokens, positions, None, **inputs), lambda output, non_loss_data: output


def _everywhere(
    collected: "list[torch.Tensor]", layout: Layout, input_ids: "torch.Tensor", gathered: bool
) -> "torch.Tensor":
    """The last stage's logits of whole sequences, sent to every stage.

    They are `gathered` over the vocabulary by the model, or else here.
    """
    import torch
    import torch.distributed as dist

    last = layout.pipeline_size - 1
    logits: Any = None
    if layout.pipeline_rank == last:
        logits = torch.cat(collected[: input_ids.shape[0]]).float().contiguous()
        if not gathered:
            parts = [torch.empty_like(logits) for _ in range(layout.tensor_size)]
            dist.all_gather(parts, logits, group=layout.tensor_group)
            logits = torch.cat(parts, -1)
        if layout.context_size > 1:
            parts = [torch.empty_like(logits) for _ in range(layout.context_size)]
            dist.all_gather(parts, logits, group=layout.context_group)
            logits = in_order(parts, 1)
    if layout.pipeline_size > 1:
        shape: list[Any] = [None if logits is None else tuple(logits.shape)]
        dist.broadcast_object_list(shape, group=layout.pipeline_group, group_src=last)
        if logits is None:
            logits = torch.empty(shape[0], device=input_ids.device)
        dist.broadcast(logits, group=layout.pipeline_group, group_src=last)
    return logits
