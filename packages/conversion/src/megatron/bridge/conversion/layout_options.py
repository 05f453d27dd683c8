"""The parallel layout as options of commands, as provider fields, and as a number of ranks."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import click

# Option -> (provider field, help).
_SIZES = {
    "tp": ("tensor_model_parallel_size", "Tensor-parallel ranks."),
    "pp": ("pipeline_model_parallel_size", "Pipeline stages."),
    "vpp": ("virtual_pipeline_model_parallel_size", "Virtual pipeline stages per stage."),
    "ep": ("expert_model_parallel_size", "Expert-parallel ranks."),
    "etp": ("expert_tensor_parallel_size", "Tensor-parallel ranks of experts; as --tp unless given."),
}


def layout_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command --tp, --pp, --vpp, --ep and --etp; they reach it as `layout`: provider fields that were set."""

    @functools.wraps(command)
    def with_layout(*args: Any, **options: Any) -> Any:
        sizes = {option: options.pop(option) for option in _SIZES}
        layout = {_SIZES[option][0]: size for option, size in sizes.items() if size is not None}
        return command(*args, layout=layout, **options)

    for option, (_, text) in reversed(_SIZES.items()):
        least = 2 if option == "vpp" else 1
        with_layout = click.option(f"--{option}", type=click.IntRange(least), help=text)(with_layout)
    return with_layout


def ranks_of(layout: Mapping[str, int]) -> int:
    """The fewest ranks that make this layout."""
    tensor, experts = layout.get("tensor_model_parallel_size", 1), layout.get("expert_model_parallel_size", 1)
    expert_tensor = layout.get("expert_tensor_parallel_size", tensor)
    return layout.get("pipeline_model_parallel_size", 1) * math.lcm(tensor, experts * expert_tensor)
