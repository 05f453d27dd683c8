"""How a configuration says which data and how much of it: `split="99,1,0"` and `["0.7", "a", "0.3", "b"]`.

Megatron-Core reads the split with a regular expression that skips what it does not understand; here it is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.bridge.errors import BridgeError

SPLIT_NAMES = ("train", "valid", "test")


@dataclass(frozen=True)
class Blend:
    """Prefixes of `.bin`/`.idx` pairs and their weights; `weights` is None for "in proportion to their size"."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None = None


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of train, valid and test, summing to 1, from e.g. `"99,1,0"` (missing trailing ones are 0).

    Raises:
        BridgeError: not one to three numbers, a negative or non-finite one, or all of them 0.
    """
    example = 'write it like "99,1,0": shares of train, valid and test'
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError as error:
        raise BridgeError(f"dataset.split={split!r} is not a list of numbers; {example}") from error
    if len(shares) > len(SPLIT_NAMES):
        raise BridgeError(f"dataset.split={split!r} has {len(shares)} shares, at most 3 are possible; {example}")
    if not all(math.isfinite(share) and share >= 0 for share in shares):
        raise BridgeError(f"dataset.split={split!r} has a negative or infinite share; {example}")
    total = sum(shares)
    if total <= 0:
        raise BridgeError(f"dataset.split={split!r} sums to {total:g}, so no split would hold any data; {example}")
    train, valid, test = (*(share / total for share in shares), 0.0, 0.0)[:3]
    return train, valid, test


def document_range(shares: Sequence[float], split: int, documents: int) -> tuple[int, int]:
    """First and one-past-last document of split 0, 1 or 2, rounded as Megatron-Core's dataset builder rounds them."""
    edges = [0.0]
    for share in shares:
        edges.append(edges[-1] + share)
    return round(edges[split] * float(documents)), round(edges[split + 1] * float(documents))


def parse_blend(entries: Sequence[str], field: str) -> Blend:
    """`["a", "b"]` or `["0.7", "a", "0.3", "b"]` as a `Blend`.

    Args:
        entries: prefixes, or weights and prefixes in turn.
        field: the configuration key, for messages, e.g. `dataset.data_paths`.

    Raises:
        BridgeError: empty, a weight without a prefix, or a weight that is not positive.
    """
    if isinstance(entries, str):
        raise BridgeError(f"{field}={entries!r} must be a list, e.g. [{entries!r}]")
    if not entries:
        raise BridgeError(f"{field} is empty; name at least one prefix of a .bin/.idx pair")
    weights = [_weight(entry) for entry in entries]
    if all(weight is None for weight in weights):
        return Blend(tuple(entries))
    if len(entries) % 2 or None in weights[::2] or any(weight is not None for weight in weights[1::2]):
        raise BridgeError(
            f"{field}={list(entries)!r} mixes weights and prefixes; give prefixes only, or a weight before each one, "
            'e.g. ["0.7", "a", "0.3", "b"]'
        )
    given = tuple(weight for weight in weights[::2] if weight is not None)
    for weight, prefix in zip(given, entries[1::2], strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise BridgeError(
                f"{field}: the weight {weight:g} of {prefix!r} must be positive; remove the prefix instead"
            )
    return Blend(tuple(entries[1::2]), given if len(given) > 1 else None)


def _weight(entry: str) -> float | None:
    try:
        return float(entry)
    except ValueError:
        return None
