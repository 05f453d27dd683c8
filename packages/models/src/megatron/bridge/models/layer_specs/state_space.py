"""The recurrences of state-space layers in plain PyTorch: chunk by chunk, in fp32, differentiable, at any length."""

import torch
from torch import Tensor
from torch.nn.functional import conv1d


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each channel's convolution with its own kernel, of the present and earlier positions only.

    Args:
        x: `[batch, length, channels]`.
        weight: `[channels, 1, width]`.
        bias: `[channels]` or None.
    """
    padded = torch.nn.functional.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
    return conv1d(padded, weight, bias, groups=weight.shape[0]).transpose(1, 2)


def scan_heads(x: Tensor, steps: Tensor, rates: Tensor, inputs: Tensor, outputs: Tensor, *, chunk: int = 64) -> Tensor:
    """Mamba-2's recurrence, computed as its dual form within a chunk (arXiv:2405.21060, section 6).

    Per head, h_t = exp(step_t rate) h_{t-1} + step_t input_t x_t^T and y_t = output_t^T h_t.

    Args:
        x: `[batch, length, heads, channels]`.
        steps: step sizes `[batch, length, heads]`, not negative.
        rates: `[heads]`, negative.
        inputs, outputs: the paper's B and C, `[batch, length, groups, state]`; a group serves heads that follow one
            another.
        chunk: positions that are computed at once.

    Returns:
        y, in fp32, of x's shape.
    """
    batch, _, heads, channels = x.shape
    groups, size = inputs.shape[2:]
    # [batch, length, groups, heads per group, ...]: heads of a group share inputs and outputs.
    steps = steps.float().unflatten(2, (groups, -1))
    values = x.float().unflatten(2, (groups, -1)) * steps[..., None]
    decays = steps * rates.float().view(groups, -1)
    state = values.new_zeros(batch, groups, heads // groups, size, channels)
    pieces = []
    for value, decay, given, read in zip(
        *(each.split(chunk, 1) for each in (values, decays, inputs.float(), outputs.float())), strict=True
    ):
        piece, state = _chunk_of_heads(state, value, decay.cumsum(1), given, read)
        pieces.append(piece)
    return torch.cat(pieces, 1).flatten(2, 3)


def _chunk_of_heads(state: Tensor, value: Tensor, total: Tensor, given: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """(outputs of one chunk, the state behind it); `total` is the logarithm of the decay since the chunk's start."""
    between = _decay_between(total)
    scores = torch.einsum("bign,bjgn->bijg", read, given)[..., None] * between
    piece = torch.einsum("bijgr,bjgrp->bigrp", scores, value)
    piece = piece + torch.einsum("bign,bgrnp->bigrp", read, state) * total.exp()[..., None]
    remaining = (total[:, -1:] - total).exp()[..., None]
    added = torch.einsum("bjgn,bjgrp->bgrnp", given, value * remaining)
    return piece, state * total[:, -1].exp()[..., None, None] + added


def _decay_between(total: Tensor) -> Tensor:
    """`[batch, i, j, ...]`: the decay from position j to i, zero where i comes before j."""
    length = total.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=total.device).triu(1)
    later = later.view(length, length, *(1 for _ in total.shape[2:]))
    # Before the exponential, which would overflow there.
    return (total[:, :, None] - total[:, None]).masked_fill(later, -torch.inf).exp()
