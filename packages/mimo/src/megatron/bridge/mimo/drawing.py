"""A placement as text: one row for each rank, one column for each module."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.bridge.mimo.parallelism import MimoParallelismConfig, ModuleParallelismConfig

_SHORT = {"data_parallel": "DP", "pipeline_parallel": "PP", "context_parallel": "CP", "tensor_parallel": "TP"}


def draw_placement(config: "MimoParallelismConfig", world_size: int) -> str:
    """Which part of which module each rank holds: its index on every axis the module is split or repeated along.

    `whole` is a module that is neither, `-` a module that is not there. Placements that do not work can be drawn too:
    a rank that two heterogeneous modules claim shows both, an idle one none.
    """
    names = list(config.module_parallelisms)
    rows = [["rank", *names]]
    for rank in range(world_size):
        rows.append([str(rank), *(held_part(config.module_parallelisms[name], rank) for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(names) + 1)]
    rows.insert(1, ["-" * width for width in widths])
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{config.mode} placement", *lines])


def held_part(layout: "ModuleParallelismConfig", rank: int) -> str:
    """What a rank holds of a module."""
    place = layout.coordinates(rank)
    if place is None:
        return "-"
    return " ".join(f"{short}{place[axis]}" for axis, short in _SHORT.items() if getattr(layout, axis) > 1) or "whole"


def written(config: "MimoParallelismConfig") -> str:
    """A placement on one line: `images DP2, language_module TP2`."""
    return ", ".join(f"{name} {written_sizes(layout)}" for name, layout in config.module_parallelisms.items())


def written_sizes(layout: "ModuleParallelismConfig") -> str:
    """A layout as people write it: `DP2 TP4`."""
    sizes = {short: getattr(layout, axis) for axis, short in (*_SHORT.items(), ("expert_parallel", "EP"))}
    return " ".join(f"{short}{size}" for short, size in sizes.items() if size > 1) or "whole"
