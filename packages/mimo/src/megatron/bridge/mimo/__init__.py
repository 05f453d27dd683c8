"""Several models, each with its own parallelism, trained as one. Where each of them lives is told without torch."""

import importlib
from typing import TYPE_CHECKING, Any

from megatron.bridge.mimo.drawing import draw_placement
from megatron.bridge.mimo.parallelism import (
    DEPLOYMENT_MODES,
    MimoParallelismConfig,
    ModuleParallelismConfig,
    PlacementError,
)
from megatron.bridge.mimo.repairs import Change, Fix
from megatron.bridge.mimo.violations import Violation

if TYPE_CHECKING:
    from megatron.bridge.mimo.encoders import ENCODERS, Encoder
    from megatron.bridge.mimo.provider import MimoProvider

# What needs torch or Megatron-Core is loaded when it is asked for.
_LAZY = {
    "ENCODERS": "encoders",
    "Encoder": "encoders",
    "MimoProvider": "provider",
}

__all__ = [
    "DEPLOYMENT_MODES",
    "ENCODERS",
    "Change",
    "Encoder",
    "Fix",
    "MimoParallelismConfig",
    "MimoProvider",
    "ModuleParallelismConfig",
    "PlacementError",
    "Violation",
    "draw_placement",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
