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
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        # For the losses of prediction layers, which the model adds up by itself.
        loss_mask=batch["loss_mask"],
    )
    return output, partial(masked_loss, batch["loss_mask"])


def masked_loss(loss_mask: "Tensor", losses: "Tensor") -> tuple["Tensor", "Tensor", dict[str, "Tensor"]]:
    """`(sum, number, report)` of the losses that `loss_mask` keeps; both [micro batch, sequence]."""
    import torch

    mask = loss_mask.reshape(-1).float()
    total = (losses.reshape(-1).float() * mask).sum()
    # The schedule counts tokens in an int.
    tokens = mask.sum().to(torch.int)
    return total, tokens, {LOSS: torch.stack([total.detach(), tokens.to(total.dtype)])}


def _no_loss(output: "Tensor") -> Any:
    raise AssertionError("the last pipeline stage always has data")
