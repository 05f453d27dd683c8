"""How a method's settings name modules: by Megatron's names, by Hugging Face's, and by layer."""

import fnmatch
import re
from collections.abc import Iterable

from megatron.bridge.errors import BridgeError

REGEX = "re:"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


def matches(pattern: str, full_name: str) -> bool:
    """Whether `pattern` is the module's last name, its full name, a shell pattern or (`re:...`) an expression of it."""
    if pattern.startswith(REGEX):
        return _compiled(pattern).fullmatch(full_name) is not None
    return pattern == full_name.rpartition(".")[2] or fnmatch.fnmatchcase(full_name, pattern)


def matches_any(patterns: Iterable[str], names: Iterable[str]) -> bool:
    """Whether one of `patterns` matches one of `names`."""
    return any(matches(pattern, name) for pattern in patterns for name in names)


def _compiled(pattern: str) -> re.Pattern[str]:
    expression = pattern.removeprefix(REGEX)
    try:
        return re.compile(expression)
    except re.error as error:
        raise BridgeError(f"the target {pattern!r} is no regular expression: {error}") from error


def layers_of(text: "str | list[int] | None") -> frozenset[int] | None:
    """The layers that `[0, 1, 7]` or `"0-3,7"` names; None for all.

    Raises:
        BridgeError: the text is neither.
    """
    if text is None:
        return None
    if not isinstance(text, str):
        return frozenset(text)
    named: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise BridgeError(f"layers_to_transform={text!r} names no layers; write them as '0-3,7' or [0, 1, 2, 3, 7]")
        named |= set(range(int(first), int(last or first) + 1))
    return frozenset(named)


def layer_of(full_name: str) -> int | None:
    """The layer that a module is in, None for one outside the layers."""
    found = _LAYER.search(full_name)
    return int(found[1]) if found else None
