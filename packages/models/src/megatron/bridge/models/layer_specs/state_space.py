"""The recurrences of state-space layers in plain PyTorch: chunk by chunk, in fp32, differentiable, at any length."""

import torch
from torch import Tensor
from torch.nn.functional import conv1d
from torch.utils.checkpoint import checkpoint


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
    between = _decay_between(total.movedim(1, -1))
    scores = torch.einsum("bign,bjgn->bgij", read, given)[:, :, None] * between
    piece = torch.einsum("bgrij,bjgrp->bigrp", scores, value)
    piece = piece + torch.einsum("bign,bgrnp->bigrp", read, state) * total.exp()[..., None]
    remaining = (total[:, -1:] - total).exp()[..., None]
    added = torch.einsum("bjgn,bjgrp->bgrnp", given, value * remaining)
    return piece, state * total[:, -1].exp()[..., None, None] + added


def _decay_between(total: Tensor) -> Tensor:
    """`[..., i, j]`: the decay from position j to i, zero where i comes before j; `total` is `[..., positions]`."""
    length = total.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=total.device).triu(1)
    # Before the exponential, which would overflow there.
    return (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()


def scan_channels(
    x: Tensor, steps: Tensor, rates: Tensor, inputs: Tensor, outputs: Tensor, *, chunk: int = 64
) -> Tensor:
    """Mamba's recurrence (arXiv:2312.00752), in which every channel has its own step size and rates.

    h_t = exp(step_t rate) h_{t-1} + step_t x_t input_t and y_t = output_t . h_t, per channel.

    Args:
        x, steps: `[batch, length, channels]`; step sizes are not negative.
        rates: `[channels, state]`, negative.
        inputs, outputs: the paper's B and C, `[batch, length, state]`, which all channels share.
        chunk: positions that are computed at once; their states are computed again for the gradient.

    Returns:
        y, in fp32, of x's shape.
    """
    state = rates.new_zeros(x.shape[0], *rates.shape, dtype=torch.float32)
    pieces = []
    for parts in zip(*(each.float().split(chunk, 1) for each in (x, steps, inputs, outputs)), strict=True):
        piece, state = checkpoint(_chunk_of_channels, state, rates.float(), *parts, use_reentrant=False)
        pieces.append(piece)
    return torch.cat(pieces, 1)


def _chunk_of_channels(
    state: Tensor, rates: Tensor, x: Tensor, steps: Tensor, given: Tensor, read: Tensor
) -> tuple[Tensor, Tensor]:
    """(outputs of one chunk, the state behind it)."""
    # [batch, length, channels, state]
    decay = (steps[..., None] * rates).exp()
    states = (steps * x)[..., None] * given[:, :, None]
    reach = 1
    # After each round, `states` holds what the last 2 x `reach` positions have written, `decay` their decays' product.
    while reach < x.shape[1]:
        states = torch.cat([states[:, :reach], states[:, reach:] + decay[:, reach:] * states[:, :-reach]], 1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], 1)
        reach *= 2
    states = states + decay * state[:, None]
    return torch.einsum("blcn,bln->blc", states, read), states[:, -1]


def gated_delta_rule(
    queries: Tensor, keys: Tensor, values: Tensor, decays: Tensor, rates: Tensor, *, chunk: int = 64
) -> Tensor:
    """The gated delta rule, many positions at a time (arXiv:2412.06464, section 3.3).

    Per head, S_t = exp(decay_t) (1 - rate_t k_t k_t^T) S_{t-1} + rate_t k_t v_t^T and
    o_t = S_t^T q_t / sqrt(channels of a key).

    Args:
        queries, keys: `[batch, length, heads, channels]`, keys of length one.
        values: `[batch, length, heads, channels]`.
        decays: logarithms, not positive, `[batch, length, heads]`.
        rates: of learning, the papers' beta, `[batch, length, heads]`.
        chunk: positions that are computed at once.

    Returns:
        o, in fp32, of the values' shape.
    """
    # [batch, heads, length, ...]
    q, k, v = (each.float().transpose(1, 2) for each in (queries * queries.shape[-1] ** -0.5, keys, values))
    decays, rates = (each.float().transpose(1, 2) for each in (decays, rates))
    state = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1])
    pieces = []
    for parts in zip(*(each.split(chunk, 2) for each in (q, k, v, decays, rates)), strict=True):
        piece, state = _chunk_of_updates(state, *parts)
        pieces.append(piece)
    return torch.cat(pieces, 2).transpose(1, 2)


def _chunk_of_updates(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor]:
    """(outputs of one chunk, the state behind it)."""
    total = decay.cumsum(-1)
    between, since = _decay_between(total), total.exp()[..., None]
    # What each position writes depends on what the earlier ones of the chunk have written: a triangular system.
    system = rate[..., None] * (k @ k.transpose(-1, -2)) * between
    wanted = rate[..., None] * (v - (since * k) @ state)
    written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    piece = (since * q) @ state + ((q @ k.transpose(-1, -2)) * between) @ written
    remaining = (total[..., -1:] - total).exp()[..., None]
    return piece, state * since[..., -1:, :] + (remaining * k).transpose(-1, -2) @ written
