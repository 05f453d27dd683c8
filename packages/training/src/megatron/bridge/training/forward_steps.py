"""Forward steps by name, offered under the group `megatron.bridge.forward_steps`: a micro-batch, and its loss."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.registry import Registry

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def _is_forward_step(value: object) -> bool:
    """a function (run, data_iterator, model) -> (output, loss function)"""
    return callable(value) and not isinstance(value, type)


FORWARD_STEPS: Registry[Callable[..., Any]] = Registry(
    "megatron.bridge.forward_steps", _is_forward_step, "forward step"
)


GPT = "gpt"


def forward_step_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """Why `train.forward_step` cannot be used."""
    name = cfg.train.forward_step
    if name is None:
        return
    try:
        FORWARD_STEPS[name]
    except BridgeError as error:
        yield f"train.forward_step: {error}"
    unfit = _unfit(cfg.model) if name == GPT else None
    if unfit is not None:
        yield (
            f"train.forward_step={GPT!r} computes the cross entropy of a decoder's next tokens, and {unfit}; name "
            "another (`megatron-bridge plugins --group megatron.bridge.forward_steps`), or set it to null and give "
            "pretrain() a function"
        )


def _unfit(model: Any) -> str | None:
    """What such a loss cannot be computed of."""
    if hasattr(model, "encoder_num_layers"):
        return f"a {type(model).__name__} has an encoder too"
    if getattr(model, "num_labels", None) is not None:
        return f"model.num_labels={model.num_labels} is a head of other outputs"
    return None
