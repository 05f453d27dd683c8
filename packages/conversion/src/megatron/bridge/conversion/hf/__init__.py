"""Hugging Face folders: found, proven whole, read by the slice, and written whole or not at all.

The names are loaded when they are first asked for, because weights need torch and configurations do not.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.bridge.conversion.hf.errors import HFFolderError as HFFolderError
    from megatron.bridge.conversion.hf.folder import companion_files as companion_files
    from megatron.bridge.conversion.hf.folder import copy_companions as copy_companions
    from megatron.bridge.conversion.hf.folder import write_config as write_config
    from megatron.bridge.conversion.hf.source import HFSource as HFSource
    from megatron.bridge.conversion.hf.weights import HFWeights as HFWeights
    from megatron.bridge.conversion.hf.weights import TensorInfo as TensorInfo
    from megatron.bridge.conversion.hf.writer import HFFolderWriter as HFFolderWriter

_MODULES = {
    "HFFolderError": "errors",
    "HFFolderWriter": "writer",
    "HFSource": "source",
    "HFWeights": "weights",
    "TensorInfo": "weights",
    "companion_files": "folder",
    "copy_companions": "folder",
    "write_config": "folder",
}

__all__ = [
    "HFFolderError",
    "HFFolderWriter",
    "HFSource",
    "HFWeights",
    "TensorInfo",
    "companion_files",
    "copy_companions",
    "write_config",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
