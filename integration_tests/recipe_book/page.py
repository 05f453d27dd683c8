"""`docs/recipe-book.md`, written from the tables and from what was tried."""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.bridge.recipes.base.families import sizes

TASKS = ("pretrain", "finetune", "lora")
_HEAD = """\
# The recipe book

Made by `just recipes`; not written by hand. Every recipe of `megatron-bridge-recipes`: models by family, with their
published number of parameters and what transformers' own class of that size has, counted. `tiny` says which recipes
were trained for two steps in a tiny variant of themselves on a CPU (`megatron-bridge recipes try`): `p` pretraining,
`f` tuning, `l` LoRA. The last column has the layouts for pretraining that `gpus=` takes: the planner's choice, and the
memory that it expects.
"""

type Trials = Mapping[str, str | None]


def page(counted: Mapping[str, int], tried: Trials, layouts: Mapping[str, Any], versions: str) -> str:
    """The page's text."""
    return "\n".join(_lines(counted, tried, layouts, versions)) + "\n"


def _lines(counted: Mapping[str, int], tried: Trials, layouts: Mapping[str, Any], versions: str) -> Iterator[str]:
    yield _HEAD
    yield "| model | published | counted | tiny | layouts |"
    yield "|---|---|---|---|---|"
    for name, (_, size) in sizes().items():
        passed = " ".join(task[0] for task in TASKS if tried[f"{name}_{task}_config"] is None)
        places = layouts.get(name, {}).get("pretrain", {})
        told = "; ".join(f"{place}: {each['layout']} ({each['gb']} GB)" for place, each in places.items())
        home = f"[{name}](https://huggingface.co/{size.home})"
        yield f"| {home} | {size.parameters} ({size.counted_by}) | {counted[name]:,} | {passed} | {told} |"
    refused = {name: why for name, why in tried.items() if why is not None}
    if refused:
        yield "\nRefused:\n"
        yield from (f"- {name}: {' '.join(why.split())}" for name, why in refused.items())
    yield f"\nTried with {versions}."
