"""Activation functions by the names that Hugging Face configurations use."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron.bridge.errors import BridgeError, did_you_mean


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return functional.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """GELU by a sigmoid (arXiv:1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x: Tensor) -> Tensor:
    """ReLU squared (arXiv:2109.08668)."""
    return torch.square(functional.relu(x))


ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": functional.relu,
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
    return ACTIVATIONS[name]
