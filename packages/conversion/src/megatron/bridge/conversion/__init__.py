"""Conversion between Hugging Face and Megatron-Core. Names are loaded when they are first asked for."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.bridge.conversion.auto_bridge import AutoBridge as AutoBridge
    from megatron.bridge.conversion.model_bridge import MegatronModelBridge as MegatronModelBridge
    from megatron.bridge.conversion.table import Tied as Tied
    from megatron.bridge.conversion.table import WeightRule as WeightRule
    from megatron.bridge.conversion.table import WeightTable as WeightTable

_HOMES = {
    "AutoBridge": "auto_bridge",
    "MegatronModelBridge": "model_bridge",
    "Tied": "table",
    "WeightRule": "table",
    "WeightTable": "table",
}

__all__ = ["AutoBridge", "MegatronModelBridge", "Tied", "WeightRule", "WeightTable"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
