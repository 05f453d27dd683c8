"""`just recipes`: write the entry points, the layouts by hardware and `docs/recipe-book.md`; try every recipe."""

import json
import re
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from megatron.bridge.errors import BridgeError
from megatron.bridge.recipes.base.building import hf_config
from megatron.bridge.recipes.base.families import entry_points, recipes, sizes
from megatron.bridge.recipes.base.hardware import LAYOUTS
from megatron.bridge.recipes.base.modules import recipes_of_size
from megatron.bridge.recipes.base.recipe import Recipe
from megatron.bridge.recipes.base.trial import trial
from megatron.bridge.testing import import_engine, run_ranks
from recipe_book.layouts import layouts
from recipe_book.page import page

REPOSITORY = Path(__file__).parents[2]
PAGE, PROJECT = REPOSITORY / "docs/recipe-book.md", REPOSITORY / "recipes/pyproject.toml"
PACKAGES = ("torch", "megatron-core", "transformers")
_GROUP = '[project.entry-points."megatron.bridge.recipes"]\n'


def main() -> int:
    """All of it; the layouts alone with the argument `layouts`."""
    text = PROJECT.read_text("utf-8")
    made = _GROUP + "\n".join(entry_points()) + "\n\n"
    PROJECT.write_text(re.sub(re.escape(_GROUP) + r".*?\n\n", lambda _: made, text, flags=re.DOTALL), "utf-8")
    chosen = layouts()
    LAYOUTS.write_text(_compact(chosen), "utf-8")
    if sys.argv[1:] == ["layouts"]:
        return 0
    import_engine()
    tried: dict[str, str | None] = {}
    for name, (_, size) in sizes().items():
        # A fork for each: process groups leave threads behind that do not rest.
        tried |= run_ranks(1, tried_tasks, recipes_of_size(name, size), timeout=600)[0]
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    PAGE.write_text(page(counted(), tried, chosen, versions), "utf-8")
    return 0


def _compact(chosen: dict[str, object]) -> str:
    """One line per size."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in chosen.items())
    return f"{{\n{lines}\n}}\n"


def tried_tasks(tasks: Mapping[str, Recipe]) -> dict[str, str | None]:
    """Recipe -> why its tiny variant was refused, None where it trained."""
    found: dict[str, str | None] = {}
    for recipe in tasks.values():
        try:
            trial(recipe.describe())
            found[recipe.name] = None
        except BridgeError as error:
            found[recipe.name] = str(error)
        print(recipe.name, found[recipe.name] or "trained", flush=True)
    return found


def counted() -> dict[str, int]:
    """Parameters of transformers' model of every size, from shapes alone."""
    import torch

    from megatron.bridge.conversion.reference import model_class

    found = {}
    for name in sizes():
        config = hf_config(recipes()[f"{name}_pretrain_config"].describe())
        with torch.device("meta"):
            found[name] = int(model_class(config)._from_config(config).num_parameters())
    return found


if __name__ == "__main__":
    sys.exit(main())
