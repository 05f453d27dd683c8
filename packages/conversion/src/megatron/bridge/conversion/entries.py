"""Entries of stacked Hugging Face weights: `down_proj[3]` is entry 3 of the leading axis of `down_proj`.

Some checkpoints hold one weight per expert, others stack the experts of a layer. Rules and plans speak of single
experts in both cases; only reading and writing know the difference.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from megatron.bridge.conversion.names import NamePattern, skeleton
from megatron.bridge.conversion.transforms import Shape

if TYPE_CHECKING:
    import torch

_ENTRY = re.compile(r"(.+)\[(\d+)\]")
_SUBSCRIPT = re.compile(r"\[[^]]+\]$")


def base_name(name: str) -> str:
    """The stacked weight's name of an entry's name or pattern; any other name as it is."""
    return _SUBSCRIPT.sub("", name)


def entry_of(name: str) -> tuple[str, int] | None:
    """Stacked weight and index of an entry's name, or None."""
    found = _ENTRY.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def with_entries(hf: Mapping[str, Shape], stacked: Sequence[NamePattern]) -> dict[str, Shape]:
    """`hf` with each weight that one of `stacked` spells replaced by its entries."""
    skeletons = {pattern.skeleton for pattern in stacked}
    expanded: dict[str, Shape] = {}
    for name, shape in hf.items():
        if skeleton(name) in skeletons and shape:
            expanded |= {f"{name}[{index}]": tuple(shape[1:]) for index in range(shape[0])}
        else:
            expanded[name] = shape
    return expanded


def without_entries(hf: Mapping[str, Shape]) -> dict[str, Shape]:
    """The weights as a file holds them: entries joined to stacked weights, where their first one stood."""
    joined: dict[str, Shape] = {}
    for name, shape in hf.items():
        entry = entry_of(name)
        base, count = (name, None) if entry is None else (entry[0], entry[1] + 1)
        joined[base] = shape if count is None else (max(count, joined.get(base, (0,))[0]), *shape)
    return joined


def join_entries(
    weights: "Iterable[tuple[str, torch.Tensor]]", shapes: Mapping[str, Shape]
) -> "Iterator[tuple[str, torch.Tensor]]":
    """Collect entries into stacked weights, each given on when its last entry has come; others pass through.

    Args:
        weights: names, entries among them, with tensors.
        shapes: of the stacked weights.
    """
    partial: dict[str, tuple[torch.Tensor, int]] = {}
    for name, tensor in weights:
        entry = entry_of(name)
        if entry is None:
            yield name, tensor
            continue
        base, index = entry
        stacked, held = partial.get(base) or (tensor.new_empty(shapes[base]), 0)
        stacked[index] = tensor
        partial[base] = stacked, held + 1
        if held + 1 == shapes[base][0]:
            del partial[base]
            yield base, stacked
