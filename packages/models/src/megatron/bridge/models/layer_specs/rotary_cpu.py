"""Rotary position embeddings in fp32 on a CPU, in one step with a backward of its own.

Megatron-Core's plain path rotates by copies: it joins halves, multiplies, adds, and joins what it rotated with the
channels that it left alone, of which mostly there are none.
"""

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor


class RotarySelfAttention(SelfAttention):
    """Megatron-Core's attention, which rotates queries and keys as they are projected, where that is quicker."""

    # The angles of the forward at hand: `[length, 1 or batch, 1, channels]`.
    _angles: Tensor | None = None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *, rotary_pos_emb: Any = None, **kwargs: Any
    ) -> Any:
        """As Megatron-Core's."""
        self._angles = rotary_pos_emb if self._own_way(hidden_states, rotary_pos_emb, kwargs) else None
        rotary_pos_emb = rotary_pos_emb if self._angles is None else None
        return super().forward(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron-Core's."""
        projected = super().get_query_key_value_tensors(*args, **kwargs)
        angles, self._angles = self._angles, None
        if angles is None:
            return projected
        query, key, value = projected
        cosine, sine = (part.mul_(self._yarn_concentration_factor) for part in (angles.cos(), angles.sin()))
        return rotate(query, cosine, sine), rotate(key, cosine, sine), value

    def _own_way(self, hidden_states: Tensor, angles: Any, kwargs: dict[str, Any]) -> bool:
        cached_or_packed = any(kwargs.get(name) is not None for name in _NOT_PLAIN)
        without = bool(self.config.no_rope_freq) or self.config.rotary_interleaved or self.config.flash_decode
        plain = isinstance(angles, Tensor) and not cached_or_packed and not without
        whole = plain and angles.shape[-1] == self.hidden_size_per_attention_head
        return whole and hidden_states.dtype == torch.float32 and hidden_states.device.type == "cpu"


# Arguments of attention that make it more than one pass over rows of equal length.
_NOT_PLAIN = ("key_value_states", "inference_context", "inference_params", "packed_seq_params")


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate each channel of the first half with its partner in the second (Su et al., arXiv:2104.09864).

    Args:
        states: `[length, batch, heads, channels]`.
        cosine, sine: of the angles, `[length, 1 or batch, 1, channels]`; both halves alike.
    """
    rotated: Tensor = _Rotation.apply(states, cosine, sine)
    return rotated


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotated(states, cosine, sine, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotated(gradient, cosine, sine, -1), None, None


def _rotated(states: Tensor, cosine: Tensor, sine: Tensor, direction: int) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    first_sine, second_sine = sine.chunk(2, dim=-1)
    result = states * cosine
    to_first, to_second = result.chunk(2, dim=-1)
    to_first.addcmul_(second, first_sine, value=-direction)
    to_second.addcmul_(first, second_sine, value=direction)
    return result
