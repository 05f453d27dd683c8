"""What is refused about Hugging Face folders, and how a list of culprits is put in words."""

from collections.abc import Iterable

from megatron.bridge.errors import BridgeError


class HFFolderError(BridgeError):
    """A Hugging Face folder cannot be found, is damaged, or cannot be written; the message names the file or tensor."""


def listing(culprits: Iterable[str], limit: int = 20) -> str:
    """One culprit per indented line, at most `limit` of them and the number of the others."""
    items = list(culprits)
    shown = [f"\n  {item}" for item in items[:limit]]
    if len(items) > limit:
        shown.append(f"\n  ... and {len(items) - limit} more")
    return "".join(shown)
