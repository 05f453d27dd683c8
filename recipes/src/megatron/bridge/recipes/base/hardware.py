"""A recipe for some hardware: layouts by GPU count and type, as data (`layouts.json`, which `just recipes` makes)."""

import json
from pathlib import Path
from typing import Any

from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.recipes.base.description import Description

LAYOUTS = Path(__file__).with_name("layouts.json")


def on(description: Description, size: str, gpus: str) -> Description:
    """The same run, divided and with a batch for these GPUs.

    Args:
        description: of a recipe.
        size: name of its model.
        gpus: e.g. `64xH100`.

    Raises:
        BridgeError: nothing is recorded for them.
    """
    from megatron.bridge.training.planner.layout import Layout

    entry = recorded(size, description.task, gpus)
    layout = Layout.parse(entry["layout"])
    batch = {"train.micro_batch_size": layout.micro_batch, "train.global_batch_size": entry["batch"]}
    fields = {f"model.{name}": value for name, value in layout.fields().items() if value is not None}
    return description.but(f"ours: the planner's choice for {gpus}, {entry['gb']} GB each", {**fields, **batch})


def recorded(size: str, task: str, gpus: str) -> dict[str, Any]:
    """Layout (as `Layout.parse` reads it), global batch, and GB per device as the planner has it.

    Raises:
        BridgeError: there is none; says for which GPUs there are.
    """
    known: dict[str, Any] = json.loads(LAYOUTS.read_text("utf-8")).get(size, {}).get(task, {})
    if gpus not in known:
        some = f"there are layouts for {', '.join(known)}" if known else "there is none for this model"
        raise BridgeError(
            f"no layout of {size} is recorded for gpus={gpus!r}{did_you_mean(gpus, known)}; {some}. "
            f"`megatron-bridge plan --recipe {size}_{task}_config --gpus {gpus}` looks for one"
        )
    found: dict[str, Any] = known[gpus]
    return found
