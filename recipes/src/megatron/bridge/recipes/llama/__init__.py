"""Llama recipes. Each is loaded when it is first asked for."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.bridge.recipes.llama.llama32_1b import pretrain_config as llama32_1b_pretrain_config

_RECIPES = {"llama32_1b_pretrain_config": ("llama32_1b", "pretrain_config")}

__all__ = ["llama32_1b_pretrain_config"]


def __getattr__(name: str) -> Any:
    if name in _RECIPES:
        module, function = _RECIPES[name]
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
