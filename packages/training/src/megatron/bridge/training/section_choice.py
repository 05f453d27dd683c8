"""Sections whose class is chosen by a name: `peft=lora`, or `peft: {name: lora, dim: 8}` in YAML."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from megatron.bridge.errors import BridgeError

# Key of a field's metadata: `module:attribute` of the registry that its classes are found in.
REGISTRY = "registry"
NAME = "name"


def registry_of(owner: Any, name: str) -> Any:
    """The registry that a field's classes come from, None for a field of another kind."""
    for field in dataclasses.fields(owner):
        if field.name == name and REGISTRY in field.metadata:
            module, _, attribute = field.metadata[REGISTRY].partition(":")
            return getattr(importlib.import_module(module), attribute)
    return None


def chosen(registry: Any, value: Any, class_key: str) -> tuple[Any, dict[str, Any]]:
    """A new section, and the fields that are to be set on it.

    Args:
        registry: that knows the names.
        value: a name, or a mapping with a name or a class (`module:Class`) and fields; None for no section.
        class_key: the key that gives a class.

    Raises:
        ValueError: neither, or nothing of that name.
    """
    if value is None or value == "null":
        return None, {}
    fields = {} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else None
    if fields is None:
        raise ValueError(f"expected a name ({', '.join(sorted(registry))}) or fields with a name, not {value!r}")
    name, target = fields.pop(NAME, None), fields.pop(class_key, None)
    try:
        if target is not None:
            module, _, attribute = str(target).partition(":")
            return getattr(importlib.import_module(module), attribute)(), fields
        wanted = value if isinstance(value, str) else name
        if wanted is None:
            raise ValueError(f"needs a name: {', '.join(sorted(registry))}")
        return registry[wanted](), fields
    except (BridgeError, ImportError, AttributeError) as error:
        raise ValueError(str(error)) from None
