"""The forward step of a GPT model: next-token cross entropy over the tokens that the loss mask keeps."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.training.state import RunState

LOSS = "lm loss"
_MODALITIES = "modality_inputs"


def forward_step(
    state: "RunState", data_iterator: Iterator[dict[str, "Tensor"]] | None, model: Any
) -> tuple["Tensor", Callable[["Tensor"], Any]]:
    """One micro-batch through one model chunk.

    Args:
        state: the run.
        data_iterator: yields dicts of `tokens`, `labels`, `loss_mask`, `position_ids` [micro batch, sequence] and
            perhaps `attention_mask`; of packed samples `cu_seqlens` [1, documents + 1] too, and one sample at a time.
            None on pipeline stages that need no data.
        model: the chunk.

    Returns:
        The chunk's output (on the last stage the loss of each token, [micro batch, sequence]), and the function that
        turns it into `(sum of losses, number of tokens, {"lm loss": [sum, number]})`.

    Raises:
        BridgeError: the batch has what only models of several modules take.
    """
    from megatron.bridge.platform import device

    if data_iterator is None:
        return model(None, None, None, labels=None), _no_loss
    given = next(data_iterator)
    if _MODALITIES in given:
        raise BridgeError(
            f"the batch has {_MODALITIES}, which are for models of several modules; train a MimoProvider by "
            "megatron.bridge.mimo.mimo_step.forward_step, or leave them out"
        )
    batch = {name: value.to(device(), non_blocking=True) for name, value in given.items()}
    bounds = batch.pop("cu_seqlens", None)
    batch = on_this_context_rank(batch, bounds)
    further = {} if bounds is None else {"packed_seq_params": packed_documents(bounds)}
    # Prediction layers add up their losses by themselves.
    if getattr(state.cfg.model, "mtp_num_layers", None):
        further["loss_mask"] = batch["loss_mask"]
    inputs = batch["tokens"], batch["position_ids"], batch.get("attention_mask")
    output = model(*inputs, labels=batch["labels"], **further)
    divided = context_ranks() > 1 and not state.cfg.model.calculate_per_token_loss
    return output, partial(context_parallel_loss if divided else masked_loss, batch["loss_mask"])


def context_ranks() -> int:
    """How many ranks hold a part of each sequence."""
    from megatron.core import parallel_state

    return int(parallel_state.get_context_parallel_world_size())


def packed_documents(bounds: "Tensor") -> Any:
    """Megatron-Core's parameters of a packed sample from its `cu_seqlens` [1, documents + 1]."""
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds = bounds[0]
    longest = int(bounds.diff().max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def on_this_context_rank(batch: dict[str, "Tensor"], bounds: "Tensor | None" = None) -> dict[str, "Tensor"]:
    """The part of a batch that this context-parallel rank holds: all of it without context parallelism.

    Args:
        batch: each [micro batch, sequence].
        bounds: of packed samples: `cu_seqlens` [1, documents + 1]; each document is then divided by itself.
    """
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    if context_ranks() == 1:
        return batch
    group = parallel_state.get_context_parallel_group()
    if bounds is not None:
        from megatron.bridge.conversion.context_chunks import packed_rows_of_rank

        rows = packed_rows_of_rank(bounds[0].tolist(), group.rank(), group.size()).to(bounds.device)
        return {name: value.index_select(1, rows) for name, value in batch.items()}
    part: dict[str, Tensor] = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    return part


def masked_loss(loss_mask: "Tensor", losses: "Tensor") -> tuple["Tensor", "Tensor", dict[str, "Tensor"]]:
    """`(sum, number, report)` of the losses that `loss_mask` keeps; both [micro batch, sequence]."""
    import torch

    mask = loss_mask.reshape(-1).float()
    total = (losses.reshape(-1).float() * mask).sum()
    # The schedule counts tokens in an int.
    tokens = mask.sum().to(torch.int)
    return total, tokens, {LOSS: torch.stack([total.detach(), tokens.to(total.dtype)])}


def context_parallel_loss(loss_mask: "Tensor", losses: "Tensor") -> tuple["Tensor", "Tensor", dict[str, "Tensor"]]:
    """`masked_loss` of this context-parallel rank's tokens, [micro batch, sequence / CP]. Collective.

    Megatron-Core's schedule divides the sum by the number, and gradients are averaged over the ranks. Ranks may hold
    different numbers of tokens that count; sum and number are such that the average is the micro-batch's mean.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    total, tokens, report = masked_loss(loss_mask, losses)
    dist.all_reduce(tokens, group=parallel_state.get_context_parallel_group())
    return total * context_ranks(), tokens, report


def _no_loss(output: "Tensor") -> Any:
    raise AssertionError("the last pipeline stage always has data")
