"""Attention when context-parallel ranks hold parts of every sequence.

Each rank gathers the keys and values of all (as in Llama 3, arXiv:2407.21783, section 3.3.2), and attends from its own
two chunks; see `megatron.bridge.conversion.context_chunks`.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron.bridge.conversion.context_chunks import chunks_of, in_order

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
    keys, values = (_in_order(tensor, group).permute(1, 2, 0, 3) for tensor in (key, value))
    length = query.shape[0] // 2
    outputs = []
    for half, place in enumerate(chunks_of(group.rank(), group.size())):
        rows, end = slice(half * length, (half + 1) * length), (place + 1) * length
        mask = None if hidden is None else _rows(hidden, rows)[..., :end]
        outputs.append(attend(query[rows].permute(1, 2, 0, 3), keys[:, :, :end], values[:, :, :end], mask))
    return torch.cat(outputs, 2).permute(2, 0, 1, 3).flatten(2)


def _rows(hidden: Tensor, rows: slice) -> Tensor:
    return hidden if hidden.shape[-2] == 1 else hidden[..., rows, :]


def _in_order(part: Tensor, group: Any) -> Tensor:
    """The tokens of all ranks in their order; on the way back every rank gets the sum of its tokens' gradients."""
    gathered = gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=group)
    return in_order(gathered.chunk(group.size()), 0)
