"""Changing a configuration from outside: dotted overrides and YAML files, checked as a whole and applied as a whole.

train.train_iters=10 model.tensor_model_parallel_size=2 optimizer.lr=1e-4 checkpoint.save=null
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron.bridge.errors import did_you_mean
from megatron.bridge.training.field_types import annotations_of, checked, checked_text, parse_yaml
from megatron.bridge.training.section_choice import CHOICES, choose, restored_on_error
from megatron.bridge.training.validation import ConfigError, report

# A key of run_config.yaml that says which class a section has.
CLASS_KEY = "_class_"

type _Change = tuple[Any, str, Any]


def apply_overrides(cfg: Any, overrides: Iterable[str]) -> None:
    """Set fields of `cfg` from `section.field=value` texts; nothing is set unless all of them are right.

    A section that is offered by name is chosen by it, with what was set of the fields that both classes have:
    `dataset=text`.

    Raises:
        ConfigError: every unknown key (with the nearest known one), wrong type and malformed override.
    """
    problems: list[str] = []
    changes: list[_Change] = []
    with restored_on_error(cfg):
        for override in overrides:
            key, separator, text = override.partition("=")
            if not separator:
                problems.append(f"{override!r} is no override; write key=value, e.g. train.train_iters=10")
            elif key.strip() in CHOICES:
                _choose(cfg, key.strip(), text.strip(), problems)
            else:
                _collect(cfg, key.strip(), checked_text, text, changes, problems)
        _apply(changes, problems, "the overrides cannot be applied")


def apply_yaml(cfg: Any, path: str | Path) -> None:
    """Set fields of `cfg` from a YAML file of sections, e.g. the `run_config.yaml` of a checkpoint.

    Raises:
        ConfigError: the file cannot be read, or as for `apply_overrides`.
    """
    apply_content(cfg, read_sections(path), f"the configuration file {str(path)!r} cannot be applied")


def apply_content(cfg: Any, content: dict[str, Any], headline: str) -> None:
    """Set fields of `cfg` from nested mappings, as a YAML file holds them.

    Raises:
        ConfigError: as for `apply_overrides`, under `headline`.
    """
    problems: list[str] = []
    changes: list[_Change] = []
    with restored_on_error(cfg):
        for key, value in _leaves(cfg, content):
            if key.endswith(CLASS_KEY):
                problems += _class_problem(cfg, key.removesuffix(CLASS_KEY).rstrip("."), value)
            elif key in CHOICES:
                _choose(cfg, key, str(value), problems)
            else:
                _collect(cfg, key, checked, value, changes, problems)
        _apply(changes, problems, headline)


def read_sections(path: str | Path) -> dict[str, Any]:
    """What a YAML file of sections says.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the configuration file {str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"the configuration file {str(path)!r} holds no sections (train:, model:, ...)")
    return content


def class_name(value: Any) -> str:
    """`module:Class` of a section."""
    return f"{type(value).__module__}:{type(value).__qualname__}"


def _leaves(section: Any, content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted key, value)` for all that a nested mapping sets; mappings go down only where there is a section."""
    for name, value in content.items():
        child = getattr(section, str(name), None)
        is_choice = isinstance(value, dict) and f"{prefix}{name}" in CHOICES
        if is_choice and "name" in value:
            yield f"{prefix}{name}", value["name"]
            value = {key: each for key, each in value.items() if key != "name"}  # noqa: PLW2901
        if isinstance(value, dict) and (dataclasses.is_dataclass(child) or is_choice):
            yield from _leaves(child, value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _collect(
    cfg: Any, key: str, read: Callable[[Any, Any], Any], value: Any, changes: list[_Change], problems: list[str]
) -> None:
    *sections, name = key.split(".")
    owner = cfg
    for depth, section in enumerate(sections):
        if section not in annotations_of(type(owner)):
            problems.append(_unknown(cfg, key, owner, section, ".".join(sections[:depth])))
            return
        owner = getattr(owner, section)
        if not dataclasses.is_dataclass(owner):
            problems.append(f"{key!r}: {'.'.join(sections[: depth + 1])} is {owner!r}, which has no fields")
            return
    annotations = annotations_of(type(owner))
    if name not in annotations:
        problems.append(_unknown(cfg, key, owner, name, ".".join(sections)))
    elif dataclasses.is_dataclass(getattr(owner, name)):
        problems.append(f"{key!r} is a section; set one of its fields, e.g. {_example(key, getattr(owner, name))}")
    elif not _is_there(getattr(owner, name), value):
        try:
            changes.append((owner, name, read(annotations[name], value)))
        except ValueError as error:
            problems.append(f"{key}: {error}")


def _is_there(held: Any, written: Any) -> bool:
    """Whether what is written says no more than what is held: some values can be set in Python only."""
    from megatron.bridge.training.run_config import plain

    return bool(plain(held) == written)


def _example(key: str, section: Any) -> str:
    return f"{key}.{next(iter(annotations_of(type(section))), 'field')}=..."


def _unknown(cfg: Any, key: str, owner: Any, name: str, path: str) -> str:
    """Why a key is unknown: with the same name in another section, or else the nearest name where it was looked for."""
    homes = [
        f"{section}.{name}"
        for section in annotations_of(type(cfg))
        if dataclasses.is_dataclass(value := getattr(cfg, section)) and name in annotations_of(type(value))
    ]
    if homes:
        near = f"; did you mean {' or '.join(map(repr, homes))}?"
    else:
        near = did_you_mean(name, annotations_of(type(owner)))
    where = f"{path} ({type(owner).__name__})" if path else "the configuration"
    return f"unknown key {key!r}: {where} has no field {name!r}{near}"


def _choose(cfg: Any, section: str, name: str, problems: list[str], *, keep: bool = True) -> None:
    try:
        choose(cfg, section, name, keep=keep)
    except ValueError as error:
        problems.append(f"{section}: {error}")


def _class_problem(cfg: Any, path: str, expected: Any) -> list[str]:
    section = cfg
    for name in filter(None, path.split(".")):
        section = getattr(section, name, None)
    found = class_name(section)
    if found == expected:
        return []
    offered = {offer.target: offer.name for offer in CHOICES[path].offers()} if path in CHOICES else {}
    if expected in offered:
        problems: list[str] = []
        _choose(cfg, path, offered[expected], problems, keep=False)
        return problems
    return [f"{path or 'the configuration'} is a {found} here, the file was written for a {expected}"]


def _apply(changes: list[_Change], problems: list[str], headline: str) -> None:
    if problems:
        raise ConfigError(report(headline, problems))
    for owner, name, value in changes:
        setattr(owner, name, value)
