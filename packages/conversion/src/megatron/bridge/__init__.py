"""Megatron Bridge: Hugging Face and Megatron-Core, joined by proof.

This file exists in `megatron-bridge-conversion` only; every other distribution adds a sub-package beside it. Nothing
heavy is imported here: `AutoBridge` is loaded when it is first asked for.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

__path__ = pkgutil.extend_path(__path__, __name__)

if TYPE_CHECKING:
    from megatron.bridge.conversion.auto_bridge import AutoBridge as AutoBridge

__all__ = ["AutoBridge"]

# Sub-packages that live in a distribution of their own: asking for an absent one says what to install.
_DISTRIBUTIONS = {part: f"megatron-bridge-{part}" for part in ("data", "mimo", "models", "peft", "recipes", "training")}


def __getattr__(name: str) -> Any:
    if name == "AutoBridge":
        return importlib.import_module("megatron.bridge.conversion.auto_bridge").AutoBridge
    if name in _DISTRIBUTIONS:
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(
                f"megatron.bridge.{name} is not installed: it comes with the package {_DISTRIBUTIONS[name]!r} "
                f"(uv pip install {_DISTRIBUTIONS[name]})"
            ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
