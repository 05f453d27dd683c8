"""Recipes by name: functions that return a `ConfigContainer`, offered under the group `megatron.bridge.recipes`."""

from collections.abc import Callable
from typing import Any

from megatron.bridge.registry import Registry


def _is_recipe(value: object) -> bool:
    """a function that returns a ConfigContainer"""
    return callable(value) and not isinstance(value, type)


RECIPES: Registry[Callable[..., Any]] = Registry("megatron.bridge.recipes", _is_recipe, "recipe")
