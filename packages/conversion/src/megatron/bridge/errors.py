"""The root of every error this project raises on purpose.

A `BridgeError` is a refusal, not a crash: its message names the culprit, where it came from and the remedy. The CLI
prints it without a traceback and exits with a code other than 0.
"""

import difflib
from collections.abc import Iterable

_MANY = 2000  # names


class BridgeError(Exception):
    """Something was refused; the message says what, which one, and what to do about it."""


def did_you_mean(name: str, known: Iterable[str], limit: int = 3) -> str:
    """`"; did you mean 'a' or 'b'?"` for the nearest known names, or the empty string when none is near."""
    by_folded = {candidate.casefold(): candidate for candidate in known}
    if len(by_folded) > _MANY:
        # Comparing with each of a large checkpoint's weights takes seconds; those of about the same length will do.
        by_folded = {key: value for key, value in by_folded.items() if abs(len(key) - len(name)) <= 1}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=limit, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(by_folded[match]) for match in near)}?" if near else ""
