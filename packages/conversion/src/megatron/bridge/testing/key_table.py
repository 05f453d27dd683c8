"""A family's table against Megatron-Core's own: the keys and shapes of `sharded_state_dict()`."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.transforms import Shape

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.plan import Plan

# Checkpoints stack layers and experts under one key, or number them in it: a count of equal keys serves both.
_INDEX = re.compile(r"\.\d+(?=\.)")

type Keys = Counter[tuple[str, Shape]]


def keys_of_plan(plan: "Plan") -> Keys:
    """How often each (key without its indices, shape) is in a plan."""
    return Counter((_INDEX.sub("", item.megatron), item.shape) for item in plan)


def keys_of_model(chunks: "Iterable[torch.nn.Module]") -> Keys:
    """How often each (key without its indices, global shape) is in the sharded state dict of a model on one rank."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    found: Keys = Counter()
    for chunk in chunks:
        for value in _values(chunk.sharded_state_dict()):  # type: ignore[operator]
            if isinstance(value, ShardedTensor):
                # Leading axes count layers and experts.
                found[_INDEX.sub("", value.key), tuple(value.global_shape[value.prepend_axis_num :])] += 1
            elif isinstance(value, ShardedTensorFactory):
                found[_INDEX.sub("", value.key), tuple(value.data.shape)] += 1
    return found


def _values(state: Any) -> Iterator[Any]:
    if isinstance(state, dict):
        for value in state.values():
            yield from _values(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _values(value)
    else:
        yield state


def differences(plan: "Plan", chunks: "Iterable[torch.nn.Module]") -> list[str]:
    """What stands in one of the two only, each told with its shape and how often."""
    ours, theirs = keys_of_plan(plan), keys_of_model(chunks)
    told = [("only in the table", ours - theirs), ("only in sharded_state_dict()", theirs - ours)]
    return [f"{where}: {key} {list(shape)} x {count}" for where, keys in told for (key, shape), count in keys.items()]
