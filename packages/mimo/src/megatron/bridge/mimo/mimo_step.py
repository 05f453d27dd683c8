"""The forward step of the training loop, `megatron.bridge.training.pretrain`, for MIMO models."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron.bridge.mimo import step

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.mimo.model import BridgeMimoModel
    from megatron.bridge.training.state import RunState


def forward_step(
    state: "RunState", data_iterator: Iterator[Mapping[str, Any]], model: "BridgeMimoModel"
) -> tuple[Any, Callable[["Tensor"], Any]]:
    """`megatron.bridge.mimo.step.forward_step`; the run's state is of no use to it."""
    return step.forward_step(data_iterator, model)
