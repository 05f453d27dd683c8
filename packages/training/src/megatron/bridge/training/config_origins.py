"""Where each value of a configuration comes from: its class, the recipe, a file, or an override."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from megatron.bridge.training.field_types import annotations_of, readable
from megatron.bridge.training.run_config import is_default, plain


@dataclasses.dataclass(frozen=True)
class Value:
    """One field of a configuration.

    Attributes:
        key: dotted, e.g. `train.train_iters`.
        value: as it is written in YAML.
        kind: its type, as people write it.
        is_default: it is what its class has without being told.
    """

    key: str
    value: Any
    kind: str
    is_default: bool


@dataclasses.dataclass(frozen=True)
class Explained(Value):
    """A field with its `origin`: `default`, or the layer that gave it its value."""

    origin: str


def values_of(section: Any, prefix: str = "") -> Iterator[Value]:
    """Every field of a configuration that can be set, sections within sections included."""
    annotations = annotations_of(type(section))
    for field in dataclasses.fields(section):
        if not field.init:
            continue
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from values_of(value, f"{prefix}{field.name}.")
        else:
            kind = readable(annotations[field.name])
            yield Value(f"{prefix}{field.name}", plain(value), kind, is_default(field, value))


def explained(cfg: Any, layers: list[tuple[str, Callable[[Any], None]]]) -> list[Explained]:
    """Apply each layer to `cfg`, and say of every value which one gave it last.

    Args:
        cfg: what the recipe made; it is changed.
        layers: name and what it does, in the order in which they apply.
    """
    origins = {each.key: "default" if each.is_default else "recipe" for each in values_of(cfg)}
    for name, apply in layers:
        before = {each.key: each.value for each in values_of(cfg)}
        apply(cfg)
        for each in values_of(cfg):
            if each.key not in before or before[each.key] != each.value:
                origins[each.key] = name
    return [Explained(**vars(each), origin=origins[each.key]) for each in values_of(cfg)]
