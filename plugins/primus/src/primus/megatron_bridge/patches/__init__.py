"""Patches: functions that change a run's configuration, chosen by `patches: [name]` in the file."""

from collections.abc import Callable
from typing import Any

from megatron.bridge.registry import Registry


def _is_patch(value: object) -> bool:
    """a function of a ConfigContainer"""
    return callable(value)


PATCHES: Registry[Callable[[Any], None]] = Registry("megatron.bridge.primus_patches", _is_patch, "patch")
