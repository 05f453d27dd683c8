"""Layouts by hardware, as the planner chooses them; recorded, so that a recipe for some GPUs is the same every day."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.recipes.base.families import sizes
from megatron.bridge.training.planner.asking import question
from megatron.bridge.training.planner.hardware import cluster
from megatron.bridge.training.planner.plan import best

PLACES: Mapping[str, tuple[str, ...]] = {
    "pretrain": ("8xA100", "8xH100", "64xH100", "512xH100", "576xH100", "8xB200", "64xB200"),
    "finetune": ("8xA100", "8xH100", "64xH100", "8xB200"),
}


def layouts() -> dict[str, dict[str, dict[str, Any]]]:
    """Size -> task -> hardware -> layout and batch; hardware that is too small is left out."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in sizes():
        for task, places in PLACES.items():
            chosen = {place: entry for place in places if (entry := _chosen(f"{name}_{task}_config", place))}
            if chosen:
                found.setdefault(name, {})[task] = chosen
    return found


def _chosen(recipe: str, place: str) -> dict[str, Any] | None:
    try:
        asked = question(cluster(place), recipe=recipe)
        plan = best(asked, 1)[0]
    except BridgeError:
        return None
    return {"layout": str(plan.layout), "batch": asked.global_batch, "gb": round(plan.memory.total / 1e9, 1)}
