"""Model providers, layer specs and the families' weight tables. Nothing heavy is imported until a name is used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.bridge.models.gpt_provider import GPTModelProvider as GPTModelProvider

_HOMES = {"GPTModelProvider": "megatron.bridge.models.gpt_provider"}

__all__ = ["GPTModelProvider"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
