"""Parallel layouts by name: which provider fields make them, and how many ranks they take."""

import math
from collections.abc import Mapping

from megatron.bridge.errors import BridgeError, did_you_mean

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
CP = "context_parallel_size"
VPP = "virtual_pipeline_model_parallel_size"
SP = "sequence_parallel"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"

# Name -> the provider fields that make the layout.
LAYOUTS: dict[str, dict[str, int]] = {
    "single": {},
    "tp2": {TP: 2},
    "pp2": {PP: 2},
    "vpp2": {PP: 2, VPP: 2},
    "tp2pp2": {TP: 2, PP: 2},
    "tp4": {TP: 4},
    "sp2": {TP: 2, SP: True},
}
# For mixtures of experts. Experts are divided over tensor-parallel ranks as all else is, unless ETP says otherwise.
EXPERT_LAYOUTS: dict[str, dict[str, int]] = {
    "ep2": {EP: 2},
    "etp2": {ETP: 2},
    "tp2ep2": {TP: 2, EP: 2},
    "tp2etp1": {TP: 2, ETP: 1},
    "tp2ep2etp1": {TP: 2, EP: 2, ETP: 1},
    "pp2ep2": {PP: 2, EP: 2},
    "ep4": {EP: 4},
}
# Combinations that large runs use; too costly for every test.
COMBINED_LAYOUTS: dict[str, dict[str, int]] = {
    "tp2pp2sp": {TP: 2, PP: 2, SP: True},
    "tp2ep2sp": {TP: 2, EP: 2, ETP: 1, SP: True},
    "tp2pp2ep2": {TP: 2, PP: 2, EP: 2, ETP: 1},
}
# Each sequence divided over ranks; for models all of whose layers can do that.
CONTEXT_LAYOUTS: dict[str, dict[str, int]] = {
    "cp2": {CP: 2},
    "tp2cp2sp": {TP: 2, CP: 2, SP: True},
}
ALL_LAYOUTS: dict[str, dict[str, int]] = {**LAYOUTS, **EXPERT_LAYOUTS, **COMBINED_LAYOUTS}
EVERYWHERE: tuple[str, ...] = ("single", "tp2", "pp2")
EXPERTS_EVERYWHERE: tuple[str, ...] = (*EVERYWHERE, "ep2", "etp2")


def layout_fields(name: str) -> dict[str, int]:
    """The provider fields of a layout.

    Raises:
        BridgeError: no layout has this name.
    """
    known = {**ALL_LAYOUTS, **CONTEXT_LAYOUTS}
    if name not in known:
        raise BridgeError(f"no layout is called {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
    return known[name]


def layouts_for(*, experts: bool) -> tuple[str, ...]:
    """Every layout that means something for a model with or without experts."""
    needed = {EP, ETP} if not experts else set()
    return tuple(name for name, fields in ALL_LAYOUTS.items() if not needed & fields.keys())


def ranks_of(fields: Mapping[str, int]) -> int:
    """The smallest number of ranks that a layout fits: dense and expert parts divide the same ranks."""
    tensor, pipeline = fields.get(TP, 1), fields.get(PP, 1)
    return math.lcm(tensor * pipeline * fields.get(CP, 1), fields.get(EP, 1) * fields.get(ETP, tensor) * pipeline)
