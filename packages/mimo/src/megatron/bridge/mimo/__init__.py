"""Several models, each with its own parallelism, trained as one: where each of them lives. Imports no torch."""

from megatron.bridge.mimo.drawing import draw_placement
from megatron.bridge.mimo.parallelism import (
    DEPLOYMENT_MODES,
    MimoParallelismConfig,
    ModuleParallelismConfig,
    PlacementError,
)
from megatron.bridge.mimo.repairs import Change, Fix
from megatron.bridge.mimo.violations import Violation

__all__ = [
    "DEPLOYMENT_MODES",
    "Change",
    "Fix",
    "MimoParallelismConfig",
    "ModuleParallelismConfig",
    "PlacementError",
    "Violation",
    "draw_placement",
]
