"""What a format is, the registry of formats, and formats given as `module:function`."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.bridge.data.instruction.fields import Row
from megatron.bridge.data.instruction.messages import Conversation
from megatron.bridge.errors import BridgeError
from megatron.bridge.registry import Registry


class DatasetFormat:
    """A format whose rows may belong together; one of single rows is a plain function `(row) -> Conversation`."""

    def group(self, row: Row) -> str | None:
        """Consecutive rows with one key make up one piece; None for a row that stands by itself."""
        return None

    def conversations(self, rows: Sequence[Row]) -> Iterator[Conversation]:
        """The conversations of one piece.

        Raises:
            BadRow: the piece cannot be used.
        """
        raise NotImplementedError


class RowFormat(DatasetFormat):
    """A function as a format. It may also return a list of `{"role": ..., "content": ...}`."""

    def __init__(self, convert: Callable[[Row], Any]) -> None:
        self._convert = convert

    def conversations(self, rows: Sequence[Row]) -> Iterator[Conversation]:
        found = self._convert(rows[0])
        if not isinstance(found, Conversation):
            from megatron.bridge.data.instruction.formats.chat import chat

            found = chat({"messages": found})
        yield found


def _is_format(value: object) -> bool:
    """a function of a row, or a DatasetFormat"""
    return isinstance(value, DatasetFormat) or callable(value)


FORMATS: Registry[Any] = Registry("megatron.bridge.dataset_formats", _is_format, "dataset format")


def dataset_format(name: str) -> DatasetFormat:
    """The format offered as `name`, or the function at `module:function`.

    Raises:
        BridgeError: unknown (with near names), or not to be imported.
    """
    value = function_at(name) if ":" in name else FORMATS[name]
    if isinstance(value, type):
        value = value()
    return value if isinstance(value, DatasetFormat) else RowFormat(value)


def function_at(target: str) -> Any:
    """What stands at `module:attribute`.

    Raises:
        BridgeError: the module cannot be imported, or has no such attribute.
    """
    module, _, attribute = target.partition(":")
    try:
        value = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise BridgeError(
            f"{target!r} cannot be imported as module:function: {error}; name a function of a module on the Python path"
        ) from error
    if not _is_format(value):
        raise BridgeError(f"{target!r} is no function but {type(value).__name__}")
    return value
