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
    from megatron.bridge.mimo.conversion import export_hf_weights, save_hf_pretrained
    from megatron.bridge.mimo.data import (
        MimoDataConfig,
        collate,
        get_batch,
        get_data_iterator,
        get_data_iterator_colocated,
    )
    from megatron.bridge.mimo.encoders import ENCODERS, Encoder
    from megatron.bridge.mimo.module_settings import ModuleOptimizerConfig
    from megatron.bridge.mimo.own_loop import (
        finalize_model_grads,
        get_vlm_mimo_model_colocated,
        module_to_grid_tuple,
        multimodule_no_sync,
    )
    from megatron.bridge.mimo.packed_samples import PackedSamples
    from megatron.bridge.mimo.projector import PROJECTORS, Projector
    from megatron.bridge.mimo.provider import MimoProvider
    from megatron.bridge.mimo.step import forward_step

# What needs torch or Megatron-Core is loaded when it is asked for.
_LAZY = {
    "ENCODERS": "encoders",
    "Encoder": "encoders",
    "MimoDataConfig": "data",
    "MimoProvider": "provider",
    "ModuleOptimizerConfig": "module_settings",
    "PROJECTORS": "projector",
    "PackedSamples": "packed_samples",
    "Projector": "projector",
    "collate": "data",
    "export_hf_weights": "conversion",
    "finalize_model_grads": "own_loop",
    "forward_step": "step",
    "get_batch": "data",
    "get_data_iterator": "data",
    "get_data_iterator_colocated": "data",
    "get_vlm_mimo_model_colocated": "own_loop",
    "module_to_grid_tuple": "own_loop",
    "multimodule_no_sync": "own_loop",
    "logits": "predict",
    "save_hf_pretrained": "conversion",
}

__all__ = [
    "DEPLOYMENT_MODES",
    "ENCODERS",
    "PROJECTORS",
    "Change",
    "Encoder",
    "Fix",
    "MimoDataConfig",
    "MimoParallelismConfig",
    "MimoProvider",
    "ModuleOptimizerConfig",
    "ModuleParallelismConfig",
    "PackedSamples",
    "PlacementError",
    "Projector",
    "Violation",
    "collate",
    "draw_placement",
    "export_hf_weights",
    "finalize_model_grads",
    "forward_step",
    "get_batch",
    "get_data_iterator",
    "get_data_iterator_colocated",
    "get_vlm_mimo_model_colocated",
    "module_to_grid_tuple",
    "multimodule_no_sync",
    "save_hf_pretrained",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
