"""Sections that are chosen by name: `dataset=text` puts another class in the place of the recipe's. Torch-free."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.bridge.data.provider import DATASETS
from megatron.bridge.errors import BridgeError
from megatron.bridge.peft import PEFT_METHODS
from megatron.bridge.registry import Registry

# Section -> what is offered for it.
CHOICES: Mapping[str, Registry[Any]] = {"dataset": DATASETS, "peft": PEFT_METHODS}
# What stands for no section, where there may be none.
_NONE = ("null", "None")


def choose(cfg: Any, section: str, name: str, *, keep: bool = True) -> None:
    """Put the class that is offered as `name` into `section`.

    Args:
        cfg: is changed.
        section: one of `CHOICES`.
        name: of the class.
        keep: what was set of the fields that both classes have; otherwise only what the new one cannot do without.

    Raises:
        ValueError: nobody offers the name, or the class cannot be made of these fields.
    """
    from megatron.bridge.training.run_config import is_default

    if section == "peft" and name in _NONE:
        setattr(cfg, section, None)
        return
    try:
        chosen = CHOICES[section][name]
    except BridgeError as error:
        raise ValueError(str(error)) from error
    old = getattr(cfg, section)
    known = {field.name for field in dataclasses.fields(chosen) if field.init and (keep or _needed(field))}
    kept = {
        field.name: getattr(old, field.name)
        for field in (() if old is None else dataclasses.fields(old))
        if field.name in known and not is_default(field, getattr(old, field.name))
    }
    try:
        setattr(cfg, section, chosen(**kept))
    except TypeError as error:
        raise ValueError(f"{name!r} cannot be made of what is set: {error}; it can be set in Python") from error


def _needed(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@contextlib.contextmanager
def restored_on_error(cfg: Any) -> Iterator[None]:
    """Within the block sections may be replaced; after an error they are those that were there before."""
    before = {name: getattr(cfg, name) for name in CHOICES if hasattr(cfg, name)}
    try:
        yield
    except BaseException:
        for name, section in before.items():
            setattr(cfg, name, section)
        raise
