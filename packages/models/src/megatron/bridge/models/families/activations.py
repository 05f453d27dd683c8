"""Activation functions by the names that Hugging Face configurations use. torch is loaded when one is looked up."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor


def gelu_tanh(x: "Tensor") -> "Tensor":
    """GELU by its tanh approximation."""
    from torch.nn import functional

    return functional.gelu(x, approximate="tanh")


def quick_gelu(x: "Tensor") -> "Tensor":
    """GELU by a sigmoid (arXiv:1606.08415)."""
    import torch

    return x * torch.sigmoid(1.702 * x)


def squared_relu(x: "Tensor") -> "Tensor":
    """ReLU squared (arXiv:2109.08668)."""
    import torch

    return torch.square(torch.relu(x))


# A text is a name in torch.nn.functional.
ACTIVATIONS: dict[str, str | Callable[..., Any]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": "relu",
    "relu2": squared_relu,
}


def activation(name: str) -> Callable[..., Any]:
    """The activation of that name.

    Raises:
        BridgeError: no Megatron counterpart is known.
    """
    if name not in ACTIVATIONS:
        raise BridgeError(
            f"config.json: the activation {name!r} is not supported in this family"
            f"{did_you_mean(name, ACTIVATIONS)} (known: {', '.join(ACTIVATIONS)})"
        )
    found = ACTIVATIONS[name]
    if not isinstance(found, str):
        return found
    from torch.nn import functional

    return getattr(functional, found)
