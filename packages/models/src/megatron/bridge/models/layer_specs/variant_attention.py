"""Core attention with what PyTorch's fused kernels do not have: soft-capped scores, norms after RoPE, temperatures."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron.bridge.models.layer_specs.sdpa_attention import SDPAttention


class VariantAttention(SDPAttention):
    """`SDPAttention` after changes to queries, keys and scores.

    Args:
        softcap: scores s become softcap * tanh(s / softcap); they are then computed as a matrix, in fp32.
        norm: builds a norm of each query's and key's channels.
        temperature: (beta, positions): queries at position p are multiplied by 1 + beta * log(1 + p // positions).
    """

    def __init__(
        self,
        *args: Any,
        softcap: float | None = None,
        norm: Callable[..., nn.Module] | None = None,
        temperature: tuple[float, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.softcap, self.temperature = softcap, temperature
        if norm is not None:
            size, eps = self.config.kv_channels, self.config.layernorm_epsilon
            self.q_layernorm = norm(self.config, size, eps)
            self.k_layernorm = norm(self.config, size, eps)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
        if hasattr(self, "q_layernorm"):
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if self.temperature is not None:
            query = query * self._temperatures(query.shape[2], key.shape[2], query)
        if self.softcap is None:
            return super()._attend(query, key, value, hidden)
        return self._attend_capped(query, key, value, hidden, self.softcap)

    def _temperatures(self, queries: int, keys: int, like: Tensor) -> Tensor:
        """`[queries, 1]`, the last query standing at the last key."""
        beta, positions = self.temperature or (0.0, 1)
        place = torch.arange(keys - queries, keys, device=like.device)
        return (1 + beta * torch.log(1 + torch.floor(place / positions)))[:, None].to(like.dtype)

    def _attend_capped(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, cap: float) -> Tensor:
        shared = query.shape[1] // key.shape[1]
        if shared > 1:
            key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        scale = query.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        scores = (query @ key.transpose(2, 3)).float() * scale
        scores = cap * torch.tanh(scores / cap)
        seen = self.visible(query.shape[2], key.shape[2], hidden, query.device)
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        with self._dropout_generator() as probability:
            weights = torch.nn.functional.dropout(scores.softmax(-1).to(value.dtype), probability)
        return weights @ value
