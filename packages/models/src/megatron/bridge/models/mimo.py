"""The path `megatron.bridge.models.mimo`: the names of `megatron.bridge.mimo`, which comes with `megatron-bridge-mimo`.

MIMO stands above the models, so nothing is imported from it before one of its names is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType


def __getattr__(name: str) -> Any:
    if name == "__path__":  # a module, not a package
        raise AttributeError(name)
    return getattr(_mimo(), name)


def __dir__() -> list[str]:
    return dir(_mimo())


def _mimo() -> "ModuleType":
    try:
        return importlib.import_module("megatron.bridge.mimo")
    except ModuleNotFoundError as error:
        if error.name != "megatron.bridge.mimo":
            raise
        raise ImportError(
            "megatron.bridge.models.mimo is not installed: it comes with the package 'megatron-bridge-mimo' "
            "(uv pip install megatron-bridge-mimo)"
        ) from error
