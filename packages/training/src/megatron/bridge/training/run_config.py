"""What a run was configured with, as YAML: every field that differs from its default, and the class of each section.

Only what was set is written, never what Megatron-Core derives from it, so that a file stays right when one value of it
is overridden. Dtypes, callables and enum members are written by name and read back by `overrides.apply_yaml`.
"""

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron.bridge.training.overrides import CLASS_KEY, class_name


def to_yaml(cfg: Any) -> str:
    """The configuration as YAML text."""
    return yaml.safe_dump(described(cfg), sort_keys=False)


def described(section: Any) -> dict[str, Any]:
    """A section as plain data: its class, and the fields that differ from their defaults."""
    found: dict[str, Any] = {CLASS_KEY: class_name(section)}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if not field.init:
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found[field.name] = described(value)
        elif not is_default(field, value):
            found[field.name] = plain(value)
    return found


def is_default(field: "dataclasses.Field[Any]", value: Any) -> bool:
    """Whether a field has what its class gives it without being told."""
    if field.default is not dataclasses.MISSING:
        default = field.default
    elif field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    else:
        return False
    return type(default) is type(value) and bool(default == value)


def plain(value: Any) -> Any:
    """A value as YAML and JSON can hold it; types that they lack by name."""
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(held) for held in value]
    if type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    name = getattr(value, "__qualname__", None)
    # What has no importable name (a lambda, an object) is recorded for people to read.
    return f"{value.__module__}.{name}" if name and "<" not in name else repr(value)
