"""A recipe by its name, described with arguments from a command line."""

from collections.abc import Iterable
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.recipes.base.description import Description
from megatron.bridge.recipes.base.recipe import Recipe
from megatron.bridge.training.recipe_registry import RECIPES


def described(name: str, arguments: Iterable[str] = ()) -> Description:
    """What a recipe would build.

    Args:
        name: of a recipe of the group `megatron.bridge.recipes`.
        arguments: `seq_length=32768` and so on, as its function takes them.

    Raises:
        BridgeError: no such recipe or argument, or a recipe that can only be built.
    """
    recipe = RECIPES[name]
    if not isinstance(recipe, Recipe):
        raise BridgeError(
            f"the recipe {name!r} is a plain function, and says what it does when it is built only; see "
            f"`megatron-bridge config explain --recipe {name}`"
        )
    try:
        return recipe.describe(**dict(map(_argument, arguments)))
    except TypeError as error:
        raise BridgeError(str(error)) from error


def _argument(text: str) -> tuple[str, Any]:
    import yaml

    name, separator, value = text.partition("=")
    if not separator:
        raise BridgeError(f"{text!r} is no argument of a recipe; write NAME=VALUE, e.g. seq_length=32768")
    return name, yaml.safe_load(value)
