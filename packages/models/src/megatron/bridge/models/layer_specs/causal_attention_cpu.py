"""Causal attention in fp32 on a CPU: PyTorch's fused forward with a backward in blocks of queries.

PyTorch's fused backward for CPUs takes more than twice its forward. Matrix products over blocks of queries, each with
the keys up to its end only, do the same work faster (forward and backward together: 66 ms instead of 91 ms for 4 rows
of 512 tokens, 8 heads of 64, one core with AVX-512) and need memory for the probabilities of one block only.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Queries of a block: small enough for its probabilities to stay in cache, large enough for the matrix products.
_BLOCK = 32
# Shorter sequences are quicker with the fused backward.
_SHORTEST = 128


def fits(query: Tensor) -> bool:
    """Whether `blocked_causal_attention` is the faster way for such queries."""
    long = query.shape[2] >= _SHORTEST
    return long and query.device.type == "cpu" and query.dtype == torch.float32 and query.requires_grad


def blocked_causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention of `[batch, heads, length, size]`; key and value may have fewer heads (grouped queries)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output: Tensor = _BlockedCausalAttention.apply(query, key, value, scale)
    return output


class _BlockedCausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
        ctx.save_for_backward(query, key, value, output)
        ctx.scale = scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        batch, heads, length, _ = query.shape
        groups = key.shape[1]
        # The query heads of a group stand under each other, so that they share the group's keys in one product.
        by_group = (batch * groups, heads // groups, length, -1)
        queries, outputs, gradients = (tensor.reshape(by_group) for tensor in (query, output, gradient))
        keys, values = (tensor.reshape(batch * groups, length, -1) for tensor in (key, value))
        to_queries = torch.empty_like(queries)
        to_keys, to_values = torch.zeros_like(keys), torch.zeros_like(values)
        for begin in range(0, length, _BLOCK):
            end = min(begin + _BLOCK, length)
            to_queries[:, :, begin:end] = _block_backward(
                queries[:, :, begin:end],
                outputs[:, :, begin:end],
                gradients[:, :, begin:end],
                keys[:, :end],
                values[:, :end],
                to_keys[:, :end],
                to_values[:, :end],
                ctx.scale,
            )
        return to_queries.view(query.shape), to_keys.view(key.shape), to_values.view(value.shape), None


def _block_backward(
    query: Tensor,
    output: Tensor,
    gradient: Tensor,
    key: Tensor,
    value: Tensor,
    to_key: Tensor,
    to_value: Tensor,
    scale: float,
) -> Tensor:
    """One block of queries `[groups, heads, block, size]`: returns their gradient, adds to the keys' and values'."""
    shape = query.shape
    query, output, gradient = (tensor.flatten(1, 2) for tensor in (query * scale, output, gradient))
    scores = torch.bmm(query, key.transpose(1, 2))
    later = torch.ones(shape[2], shape[2], dtype=torch.bool, device=query.device).triu(1)
    # Only the last keys, those of the block itself, can lie behind a query.
    scores.unflatten(1, shape[1:3])[..., -shape[2] :].masked_fill_(later, -torch.inf)
    probabilities = scores.softmax(-1)
    to_value.baddbmm_(probabilities.transpose(1, 2), gradient)
    to_scores = torch.bmm(gradient, value.transpose(1, 2))
    # The derivative of softmax: p * (dp - sum(p * dp)), where the sum equals that of output * gradient.
    to_scores.sub_((output * gradient).sum(-1, keepdim=True)).mul_(probabilities)
    to_key.baddbmm_(to_scores.transpose(1, 2), query)
    return torch.bmm(to_scores, key).mul_(scale).view(shape)
