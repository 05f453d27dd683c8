"""The forward step of a MIMO model: every module gets its own part of the micro-batch, whatever the mode."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.bridge.mimo.slices import own_batch
from megatron.bridge.training.gpt_step import masked_loss

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.mimo.model import BridgeMimoModel


def forward_step(
    data_iterator: Iterator[Mapping[str, Any]], model: "BridgeMimoModel", **grids: Any
) -> tuple[Any, Callable[["Tensor"], Any]]:
    """One micro-batch through the modules on this rank.

    Args:
        data_iterator: yields what `slices.own_batch` takes apart.
        model: the modules.
        grids: nothing: the modules know theirs (`encoder_grid` and `llm_grid` may be given).

    Returns:
        The model's output, and the function that turns it into `(sum of losses, number of tokens, {"lm loss": [sum,
        number]})` on the last stage.
    """
    output, loss_mask = model(**moved(own_batch(model, next(data_iterator))))
    return output, partial(masked_loss, loss_mask)


def moved(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch on this process's device; what encoders take they move by themselves."""
    from torch import Tensor

    from megatron.bridge.platform import device

    return {
        name: value.to(device(), non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
