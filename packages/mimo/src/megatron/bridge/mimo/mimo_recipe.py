"""MIMO recipes by name: functions that return a `ConfigContainer` whose model is a `MimoProvider`."""

from typing import TYPE_CHECKING

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def mimo_config(recipe: str) -> "ConfigContainer":
    """What a recipe makes.

    Args:
        recipe: name of an installed one, or `module:function`.

    Raises:
        BridgeError: there is none, or it is of another kind of model.
    """
    from megatron.bridge.mimo.provider import MimoProvider
    from megatron.bridge.training.own_code import own
    from megatron.bridge.training.recipe_registry import RECIPES

    cfg: ConfigContainer = (own(recipe, "recipe") if ":" in recipe else RECIPES[recipe])()
    if not isinstance(cfg.model, MimoProvider):
        kind = type(cfg.model).__name__
        raise BridgeError(f"recipe {recipe!r} is of a {kind}, which has no modules to place; name a MIMO recipe")
    return cfg
