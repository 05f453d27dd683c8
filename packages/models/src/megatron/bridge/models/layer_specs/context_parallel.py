"""Attention when context-parallel ranks hold parts of every sequence.

Each rank gathers the keys and values of all (as in Llama 3, arXiv:2407.21783, section 3.3.2), and attends from its own
two chunks; see `megatron.bridge.conversion.context_chunks`.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron.bridge.conversion.context_chunks import chunks_of, in_order, packed_in_order
from megatron.bridge.errors import BridgeError

# Queries, keys, values `[batch, heads, length, size]`, hidden (True: not seen); the last query is at the last key.
type Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attend_from_chunks(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, group: Any
) -> Tensor:
    """Causal attention of this rank's queries to the keys of all ranks.

    Args:
        attend: attention of consecutive queries to all keys up to the last of them.
        query, key, value: `[sequence / CP, batch, heads, size]`.
        hidden: True where a query must not see a key, broadcast to `[batch, heads, sequence / CP, sequence]`.
        group: the context-parallel ranks.

    Returns:
        `[sequence / CP, batch, heads * value size]`.
    """
    keys, values = (in_order(_gathered(tensor, group).chunk(group.size()), 0) for tensor in (key, value))
    return _attend_own_chunks(attend, query, keys, values, hidden, group)


def attend_packed_from_chunks(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, bounds: Sequence[int], group: Any
) -> Tensor:
    """The same for a packed sequence, whose documents are cut into chunks each by itself and attend to themselves.

    Args:
        attend: as for `attend_from_chunks`.
        query, key, value: `[tokens / CP, heads, size]`.
        bounds: where each document of the whole sequence begins, and where the last one ends.
        group: the context-parallel ranks.

    Returns:
        `[tokens / CP, heads * value size]`.

    Raises:
        BridgeError: the bounds are not those of the sequence, or a document cannot be cut.
    """
    size = group.size()
    if bounds[0] != 0 or bounds[-1] != query.shape[0] * size:
        raise BridgeError(
            f"the documents' bounds go from {bounds[0]} to {bounds[-1]}, and {size} context-parallel ranks hold "
            f"{query.shape[0] * size} tokens; make padding at the end a document of its own"
        )
    places = packed_in_order(bounds, size).to(key.device)
    keys, values = (_gathered(tensor, group)[places].unsqueeze(1) for tensor in (key, value))
    outputs = []
    for start, stop in itertools.pairwise(bounds):
        own = query[start // size : stop // size].unsqueeze(1)
        outputs.append(_attend_own_chunks(attend, own, keys[start:stop], values[start:stop], None, group))
    return torch.cat(outputs).squeeze(1)


def _attend_own_chunks(
    attend: Attend, query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None, group: Any
) -> Tensor:
    """This rank's two chunks of queries, each to all keys (`[sequence, batch, heads, size]`) up to its last one."""
    keys, values = (tensor.permute(1, 2, 0, 3) for tensor in (keys, values))
    length = query.shape[0] // 2
    outputs = []
    for half, place in enumerate(chunks_of(group.rank(), group.size())):
        rows, end = slice(half * length, (half + 1) * length), (place + 1) * length
        mask = None if hidden is None else _rows(hidden, rows)[..., :end]
        outputs.append(attend(query[rows].permute(1, 2, 0, 3), keys[:, :, :end], values[:, :, :end], mask))
    return torch.cat(outputs, 2).permute(2, 0, 1, 3).flatten(2)


def _rows(hidden: Tensor, rows: slice) -> Tensor:
    return hidden if hidden.shape[-2] == 1 else hidden[..., rows, :]


def _gathered(part: Tensor, group: Any) -> Tensor:
    """The tokens of all ranks, by rank; on the way back every rank gets the sum of its tokens' gradients."""
    return gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=group)
