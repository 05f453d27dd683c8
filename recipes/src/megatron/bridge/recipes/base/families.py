"""Every family of this package, and what its recipes are offered as."""

import importlib
from collections.abc import Iterator

from megatron.bridge.recipes.base.modules import recipes_of_size
from megatron.bridge.recipes.base.recipe import Recipe
from megatron.bridge.recipes.base.size import Size

FAMILIES = (
    "llama",
    "mistral",
    "qwen",
    "gemma",
    "deepseek",
    "gpt_oss",
    "phi",
    "olmo",
    "nemotron",
    "mamba",
    "gpt",
    "vision_language",
)

# Vision-language models whose halves have layouts of their own; plain functions.
_MIMO = (
    "llava15_7b_mimo_align_config",
    "llava15_7b_mimo_finetune_config",
    "qwen25_vl_7b_mimo_finetune_config",
)


def sizes() -> dict[str, tuple[str, Size]]:
    """Name of a size -> its family's module, and the size."""
    modules = {family: importlib.import_module(f"megatron.bridge.recipes.{family}") for family in FAMILIES}
    return {name: (family, size) for family, module in modules.items() for name, size in module.SIZES.items()}


def recipes() -> dict[str, Recipe]:
    """Every recipe of this package, by name."""
    made = (recipes_of_size(name, size).values() for name, (_, size) in sizes().items())
    return {recipe.name: recipe for each in made for recipe in each}


def entry_points() -> Iterator[str]:
    """The lines of `pyproject.toml` that offer them all."""
    for name, (family, size) in sizes().items():
        for recipe in recipes_of_size(name, size).values():
            yield f'{recipe.name} = "megatron.bridge.recipes.{family}:{recipe.name}"'
    for name in _MIMO:
        yield f'{name} = "megatron.bridge.recipes.mimo.vision_language:{name}"'
