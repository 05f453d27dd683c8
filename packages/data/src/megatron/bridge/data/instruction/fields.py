"""Reading a row's fields, with errors that say what is there instead."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.bridge.data.instruction.messages import BadRow
from megatron.bridge.errors import did_you_mean

type Row = Mapping[str, Any]


def field_of(row: Row, name: str) -> Any:
    """The value of a field that must be there.

    Raises:
        BadRow: it is not.
    """
    if name not in row:
        raise BadRow(f"there is no field {name!r}{did_you_mean(name, map(str, row))} (the fields are {_names(row)})")
    return row[name]


def text_of(row: Row, name: str) -> str:
    """The text of a field that must be there.

    Raises:
        BadRow: it is not there, or no text.
    """
    value = field_of(row, name)
    if not isinstance(value, str):
        raise BadRow(f"the field {name!r} is no text but {_kind(value)}")
    return value


def optional_text(row: Row, name: str) -> str:
    """The text of a field; empty where it is absent or null."""
    return "" if row.get(name) is None else text_of(row, name)


def list_of(row: Row, name: str) -> Sequence[Row]:
    """The objects in a field that must be there.

    Raises:
        BadRow: it is not there, or no list of objects.
    """
    value = field_of(row, name)
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not all(isinstance(each, Mapping) for each in value)
    ):
        raise BadRow(f"the field {name!r} is no list of objects but {_kind(value)}")
    return value


def _names(row: Row) -> str:
    return ", ".join(map(repr, row)) or "none"


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
