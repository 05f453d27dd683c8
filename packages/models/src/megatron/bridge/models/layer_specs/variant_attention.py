"""Core attention with what PyTorch's fused kernels lack: soft-capped scores, ALiBi, norms after RoPE, temperatures."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs.sdpa_attention import SDPAttention


class VariantAttention(SDPAttention):
    """`SDPAttention` after changes to queries, keys and scores.

    Args:
        softcap: scores s become softcap * tanh(s / softcap); they are then a matrix, computed in fp32.
        norm: builds a norm of each query's and key's channels.
        slopes: per head of the whole model; a score falls by slope * (positions between query and key), as ALiBi
            (arXiv:2108.12409).
        blocks: the attention mask holds block numbers [batch, 1, 1, length]: tokens of one block (0 or above) see each
            other in both directions, as far as the window reaches to the left.
        temperature: (beta, positions): queries at position p are multiplied by 1 + beta * log(1 + p // positions).
    """

    def __init__(
        self,
        *args: Any,
        softcap: float | None = None,
        norm: Callable[..., nn.Module] | None = None,
        temperature: tuple[float, int] | None = None,
        slopes: Sequence[float] | None = None,
        blocks: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.softcap, self.temperature, self.slopes = softcap, temperature, slopes
        self.blocks = blocks
        if norm is not None:
            size, eps = self.config.kv_channels, self.config.layernorm_epsilon
            self.q_layernorm = norm(self.config, size, eps)
            self.k_layernorm = norm(self.config, size, eps)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
        if hasattr(self, "q_layernorm"):
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if self.temperature is not None:
            query = query * self._temperatures(query.shape[2], key.shape[2], query)
        if self.softcap is None and self.slopes is None:
            return super()._attend(query, key, value, hidden)
        return self._attend_by_scores(query, key, value, hidden)

    def visible(self, queries: int, keys: int, hidden: Tensor | None, device: torch.device) -> Tensor | None:
        """As `SDPAttention`'s, with blocks where there are any."""
        if not self.blocks or hidden is None:
            return super().visible(queries, keys, hidden, device)
        if queries != keys:
            raise BridgeError("blocks of tokens that see each other cannot be decoded from a cache of keys")
        offset = torch.arange(keys, device=device) - torch.arange(keys, device=device)[:, None]
        together = (hidden == hidden.transpose(2, 3)) & (hidden >= 0)
        seen = (offset <= 0) | together
        left = self.window[0] if self.window else None
        return seen if left is None else seen & (offset >= -left)

    def _temperatures(self, queries: int, keys: int, like: Tensor) -> Tensor:
        """`[queries, 1]`, the last query standing at the last key."""
        beta, positions = self.temperature or (0.0, 1)
        place = torch.arange(keys - queries, keys, device=like.device)
        return (1 + beta * torch.log(1 + torch.floor(place / positions)))[:, None].to(like.dtype)

    def _attend_by_scores(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
        shared = query.shape[1] // key.shape[1]
        if shared > 1:
            key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        scale = query.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        scores = (query @ key.transpose(2, 3)).float() * scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.slopes is not None:
            scores = scores + self._penalties(self.slopes, query, key.shape[2])
        seen = self.visible(query.shape[2], key.shape[2], hidden, query.device)
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        with self._dropout_generator() as probability:
            weights = torch.nn.functional.dropout(scores.softmax(-1).to(value.dtype), probability)
        return weights @ value

    def _penalties(self, slopes: Sequence[float], query: Tensor, keys: int) -> Tensor:
        """`[heads of this rank, 1, keys]`: slope * key position, which differs by a constant per query from ALiBi's."""
        from megatron.core.parallel_state import get_tensor_model_parallel_rank

        heads = query.shape[1]
        first = get_tensor_model_parallel_rank() * heads
        own = torch.tensor(slopes[first : first + heads], dtype=torch.float32, device=query.device)
        # Counted back from the last key, so that what a query sees most of stays near zero.
        return own[:, None, None] * torch.arange(1 - keys, 1, device=query.device)
