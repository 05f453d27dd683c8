"""Causal attention in fp32 on a CPU, forward and backward in blocks of queries.

PyTorch's fused kernels for CPUs compute runs of 512 keys whole, whatever of them lies behind a query, and their
backward takes more than twice their forward. Matrix products over blocks of queries, each with the keys up to its end
only, do less work and need memory for the probabilities of one block only; `benchmarks/attention.py` compares the two.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Queries of a block: small enough for its probabilities to stay in cache, large enough for the matrix products.
_BLOCK = 64
# Shorter sequences, and longer ones, are as quick with the fused kernels.
_SHORTEST, _LONGEST = 512, 1024


def fits(query: Tensor) -> bool:
    """Whether `blocked_causal_attention` is the faster way for such queries."""
    return _SHORTEST <= query.shape[2] <= _LONGEST and query.device.type == "cpu" and query.dtype == torch.float32


def blocked_causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention of `[batch, heads, length, size]`; key and value may have fewer heads (grouped queries)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output: Tensor = _BlockedCausalAttention.apply(query, key, value, scale)
    return output


class _BlockedCausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        groups = key.shape[0] * key.shape[1]
        queries, keys, values = _by_group(query, groups) * scale, _flat(key), _flat(value)
        output = _empty_by_length((*query.shape[:3], value.shape[-1]))
        for begin, end in _blocks(query.shape[2]):
            probabilities = _probabilities(queries[:, :, begin:end], keys[:, :end])
            block = torch.bmm(probabilities, values[:, :end])
            output[:, :, begin:end] = block.view(*query.shape[:2], end - begin, -1)
        ctx.save_for_backward(query, key, value, output)
        ctx.scale = scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        groups = key.shape[0] * key.shape[1]
        queries, gradients = _by_group(query, groups) * ctx.scale, _by_group(gradient, groups)
        # The derivative of softmax: p * (dp - sum(p * dp)), where the sum equals that of output * gradient.
        sums = _by_group((output * gradient).sum(-1, keepdim=True), groups)
        keys, values = _flat(key), _flat(value)
        to_query = _empty_by_length(query.shape)
        to_keys, to_values = torch.zeros_like(keys), torch.zeros_like(values)
        for begin, end in _blocks(query.shape[2]):
            block, own = queries[:, :, begin:end], gradients[:, :, begin:end].flatten(1, 2)
            probabilities = _probabilities(block, keys[:, :end])
            to_values[:, :end] += torch.bmm(probabilities.transpose(1, 2), own)
            to_scores = torch.bmm(own, values[:, :end].transpose(1, 2))
            to_scores.sub_(sums[:, :, begin:end].flatten(1, 2)).mul_(probabilities)
            to_keys[:, :end] += torch.bmm(to_scores.transpose(1, 2), block.flatten(1, 2))
            to_block = torch.bmm(to_scores, keys[:, :end]).mul_(ctx.scale)
            to_query[:, :, begin:end] = to_block.view(*query.shape[:2], end - begin, -1)
        return to_query, to_keys.view(key.shape), to_values.view(value.shape), None


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """`[groups, heads of a group, length, size]`: heads that share a key stand under each other, for one product."""
    return tensor.reshape(groups, -1, *tensor.shape[2:])


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, *tensor.shape[2:])


def _empty_by_length(shape: Sequence[int]) -> Tensor:
    """`[batch, heads, length, size]`, in memory as Megatron-Core has activations: by position first."""
    batch, heads, length, size = shape
    return torch.empty(length, batch, heads, size).permute(1, 2, 0, 3)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + _BLOCK, length)) for begin in range(0, length, _BLOCK))


def _probabilities(queries: Tensor, keys: Tensor) -> Tensor:
    """`[groups, heads * block, keys]` of scaled queries `[groups, heads, block, size]`, the last at the last key."""
    heads, block = queries.shape[1:3]
    scores = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2))
    # Only the last keys, those of the block itself, can lie behind a query.
    later = torch.full((block, block), -torch.inf).triu_(1)
    scores.unflatten(1, (heads, block))[..., -block:].add_(later)
    return scores.softmax(-1)
