"""Conversion from files to files: no model, no process group, memory bounded by a few chunks per worker, resumable.

    import_checkpoint(hf_model, megatron_path)     Hugging Face folder -> Megatron distributed checkpoint
    export_checkpoint(megatron_path, hf_path)      and back

The same tables and plans as in the live conversion decide what becomes what.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.bridge.conversion.offline.exporter import export_checkpoint as export_checkpoint
    from megatron.bridge.conversion.offline.importer import import_checkpoint as import_checkpoint

_MODULES = {"export_checkpoint": "exporter", "import_checkpoint": "importer"}

__all__ = ["export_checkpoint", "import_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
