"""What recipes there are: those of this package by model, those of others by name."""

from collections.abc import Iterable, Sequence
from typing import Any

from megatron.bridge.recipes.base.families import sizes
from megatron.bridge.recipes.base.modules import recipes_of_size
from megatron.bridge.training.recipe_registry import RECIPES


def listed(words: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One entry per model of ours, and per recipe that is a function of its own (which is not loaded)."""
    ours = [
        {
            "model": name,
            "title": size.title,
            "parameters": size.parameters,
            "source": size.home,
            "recipes": [recipe.name for recipe in recipes_of_size(name, size).values()],
        }
        for name, (_, size) in sizes().items()
    ]
    tasks = {name for each in ours for name in each["recipes"]}
    others = [
        {"model": offer.name, "title": "", "parameters": "", "source": offer.origin, "recipes": [offer.name]}
        for offer in RECIPES.offers()
        if offer.name not in tasks
    ]
    return [each for each in ours + others if _has_all(each, words)]


def _has_all(entry: dict[str, Any], words: Sequence[str]) -> bool:
    text = f"{entry['model']} {entry['title']}".casefold()
    return all(word.casefold() in text for word in words)


def table(entries: Iterable[dict[str, Any]]) -> str:
    """The entries for people."""
    rows = [(each["model"], each["parameters"], _tasks(each), each["source"]) for each in entries]
    rows = [("model", "parameters", "recipes", "source"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", "A recipe is called MODEL_RECIPE, e.g. llama32_1b_pretrain_config."])


def _tasks(entry: dict[str, Any]) -> str:
    return " ".join(name.removeprefix(f"{entry['model']}_") for name in entry["recipes"])
