"""The forward step of a GPT model: next-token cross entropy over the tokens that the loss mask keeps."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.training.state import RunState

LOSS = "lm loss"


def forward_step(
    state: "RunState", data_iterator: Iterator[dict[str, "Tensor"]] | None, model: Any
) -> tuple["Tensor", Callable[["Tensor"], Any]]:
    """One micro-batch through one model chunk.

    Args:
        state: the run.
        data_iterator: yields dicts of `tokens`, `labels`, `loss_mask`, `position_ids` [micro batch, sequence] and
            perhaps `attention_mask`; None on pipeline stages that need no data.
        model: the chunk.

    Returns:
        The chunk's output (on the last stage the loss of each token, [micro batch, sequence]), and the function that
        turns it into `(sum of losses, number of tokens, {"lm loss": [sum, number]})`.
    """
    from megatron.bridge.platform import device

    if data_iterator is None:
        return model(None, None, None, labels=None), _no_loss
    batch = {name: value.to(device(), non_blocking=True) for name, value in next(data_iterator).items()}
    batch = on_this_context_rank(batch)
    output = model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])
    return output, partial(masked_loss, batch["loss_mask"], per_token=state.cfg.model.calculate_per_token_loss)


def on_this_context_rank(batch: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    """The part of a batch that this context-parallel rank holds: all of it without context parallelism."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    if parallel_state.get_context_parallel_world_size() == 1:
        return batch
    group = parallel_state.get_context_parallel_group()
    part: dict[str, Tensor] = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    return part


def masked_loss(
    loss_mask: "Tensor", losses: "Tensor", *, per_token: bool = False
) -> tuple["Tensor", "Tensor", dict[str, "Tensor"]]:
    """The losses that `loss_mask` keeps.

    Args:
        loss_mask, losses: [micro batch, sequence], of this context-parallel rank's tokens.
        per_token: gradients are divided by the tokens of the global batch (`calculate_per_token_loss`), not by those of
            each micro-batch.

    Returns:
        `(sum, number, report)` for Megatron-Core's schedule, which divides the one by the other.
    """
    import torch

    mask = loss_mask.reshape(-1).float()
    total = (losses.reshape(-1).float() * mask).sum()
    # The schedule counts tokens in an int.
    tokens = mask.sum().to(torch.int)
    report = {LOSS: torch.stack([total.detach(), tokens.to(total.dtype)])}
    return (total, tokens, report) if per_token else (*_over_context_ranks(total, tokens), report)


def _over_context_ranks(total: "Tensor", tokens: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Sum and number whose quotient, averaged over the context-parallel ranks, is the micro-batch's mean.

    Ranks may hold different numbers of tokens that count, so that the mean of their means would be another one.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    ranks = parallel_state.get_context_parallel_world_size()
    if ranks > 1:
        tokens = tokens.clone()
        dist.all_reduce(tokens, group=parallel_state.get_context_parallel_group())
    return total * ranks, tokens


def _no_loss(output: "Tensor") -> Any:
    raise AssertionError("the last pipeline stage always has data")
