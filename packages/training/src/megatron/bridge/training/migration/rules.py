"""What becomes of an argument of Megatron-LM: kinds of rules, and tables of them from lists of names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

# How many words follow an argument: none, one, or any number.
type Arity = Literal["none", "one", "many"]
type Table = dict[str, "Rule"]


@dataclass(frozen=True)
class Rule:
    """What becomes of one argument.

    Attributes:
        arity: how many words follow it; None where they do not matter.
        fields: dotted keys of a `ConfigContainer` that it sets.
        value: what a flag sets them to.
        read: makes the value of the words; None where several arguments make it together (`together.py`).
        left_out: why nothing of it is needed here.
        refused: why it cannot be translated, and what to do instead.
    """

    arity: Arity | None = None
    fields: tuple[str, ...] = ()
    value: Any = None
    read: Callable[[Any], Any] | None = None
    left_out: str = ""
    refused: str = ""


def number(word: str) -> Any:
    """A number, or a word as it stands."""
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


def numbers(words: list[str]) -> list[Any]:
    """Several of them."""
    return [number(word) for word in words]


def same(section: str, names: str, arity: Arity = "one", read: Callable[[Any], Any] | None = None) -> Table:
    """Arguments whose fields in a section have their names."""
    table = {}
    for name in names.split():
        field = f"{section}.{name.replace('-', '_')}"
        table[name] = _rule(arity, (field,), value=True, read=read)
    return table


def moved(fields: Mapping[str, str | tuple[str, ...]], arity: Arity = "one", **more: Any) -> Table:
    """Arguments whose fields have other names, or of which each sets several."""
    return {name: _rule(arity, (keys,) if isinstance(keys, str) else keys, **more) for name, keys in fields.items()}


def _rule(arity: Arity, fields: tuple[str, ...], value: Any = True, read: Callable[[Any], Any] | None = None) -> Rule:
    if arity == "none":
        return Rule(arity, fields, value=value)
    return Rule(arity, fields, read=read or (number if arity == "one" else numbers))


def together(names: str, arity: Arity) -> Table:
    """Arguments that mean something together with others."""
    return {name: Rule(arity) for name in names.split()}


def left_out(why: str, names: str) -> Table:
    """Arguments that are not needed here."""
    return {name: Rule(left_out=why) for name in names.split()}


def refused(why: str, names: str) -> Table:
    """Arguments that cannot be translated."""
    return {name: Rule(refused=why) for name in names.split()}
