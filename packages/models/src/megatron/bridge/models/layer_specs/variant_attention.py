"""Core attention with what PyTorch's fused kernels lack: soft-capped scores, ALiBi, sinks, norms after RoPE, chunks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs.norms import rms_norm
from megatron.bridge.models.layer_specs.sdpa_attention import SDPAttention


class VariantAttention(SDPAttention):
    """`SDPAttention` after changes to queries, keys and scores.

    With `softmax_type="learnable"` each head has a sink: a score of its own to which no value belongs, so that the
    weights of a query sum to less than one (arXiv:2309.17453). It has Megatron-Core's name, `softmax_offset`.

    Args:
        softcap: scores s become softcap * tanh(s / softcap); they are then a matrix, computed in fp32.
        norm: builds a norm of each query's and key's channels.
        l2_norm_layers: per layer of the model, whether queries and keys get an RMS norm without weights; None: none.
        slopes: per head of the whole model; a score falls by slope * (positions between query and key), as ALiBi
            (arXiv:2108.12409).
        blocks: the attention mask holds block numbers [batch, 1, 1, length]: tokens of one block (0 or above) see each
            other in both directions, as far as the window reaches to the left.
        temperature: (beta, positions): queries at position p are multiplied by 1 + beta * log(1 + p // positions).
        temperature_start: the first token's position p.
        temperature_layers: per layer of the model, whether that is so; None: everywhere.
        chunks: per layer of the model, how many tokens make a chunk; a query sees no key before its own chunk.
    """

    def __init__(
        self,
        *args: Any,
        softcap: float | None = None,
        norm: Callable[..., nn.Module] | None = None,
        l2_norm_layers: Sequence[int] | None = None,
        temperature: tuple[float, int] | None = None,
        temperature_start: int = 0,
        temperature_layers: Sequence[int] | None = None,
        slopes: Sequence[float] | None = None,
        blocks: bool = False,
        chunks: Sequence[int | None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        layer = self.layer_number - 1
        self.softcap, self.slopes = softcap, slopes
        self.temperature = temperature if temperature_layers is None or temperature_layers[layer] else None
        self.temperature_start = temperature_start
        self.l2_norm = l2_norm_layers is not None and bool(l2_norm_layers[layer])
        self.chunk = None if chunks is None else chunks[layer]
        self.blocks = blocks
        if norm is not None:
            size, eps = self.config.kv_channels, self.config.layernorm_epsilon
            self.q_layernorm = norm(self.config, size, eps)
            self.k_layernorm = norm(self.config, size, eps)
        self.softmax_offset = _sinks(self.config) if self.config.softmax_type == "learnable" else None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """As the parent's, where the sinks are divided by heads over tensor-parallel ranks."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.softmax_offset is not None:
            sinks = {"softmax_offset": self.softmax_offset}
            state |= make_sharded_tensors_for_checkpoint(sinks, prefix, {"softmax_offset": 0}, sharded_offsets)
        return state

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
        if hasattr(self, "q_layernorm"):
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if self.l2_norm:
            query, key = (rms_norm(states, self.config.layernorm_epsilon) for states in (query, key))
        if self.temperature is not None:
            query = query * self._temperatures(self.temperature, query.shape[2], key.shape[2], query)
        if self.chunk is None or key.shape[2] <= self.chunk:
            return self._attend_to_all(query, key, value, hidden)
        return self._attend_by_chunks(query, key, value, hidden, self.chunk)

    def _attend_to_all(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
        if self.softcap is None and self.slopes is None and self.softmax_offset is None:
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

    def _attend_by_chunks(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, size: int) -> Tensor:
        """Each chunk by itself, the last query standing at the last key."""
        keys = key.shape[2]
        first = keys - query.shape[2]
        pieces = []
        for start in range(first // size * size, keys, size):
            stop = min(start + size, keys)
            own, seen = slice(max(start - first, 0), stop - first), slice(start, stop)
            part = (query[:, :, own], key[:, :, seen], value[:, :, seen], _part(hidden, own, seen))
            pieces.append(self._attend_to_all(*part))
        return torch.cat(pieces, 2)

    def _temperatures(self, temperature: tuple[float, int], queries: int, keys: int, like: Tensor) -> Tensor:
        """`[queries, 1]`, the last query standing at the last key."""
        beta, positions = temperature
        place = self.temperature_start + torch.arange(keys - queries, keys, device=like.device)
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
            weights = torch.nn.functional.dropout(self._softmax(scores).to(value.dtype), probability)
        return weights @ value

    def _softmax(self, scores: Tensor) -> Tensor:
        if self.softmax_offset is None:
            return scores.softmax(-1)
        sinks = self.softmax_offset.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]

    def _penalties(self, slopes: Sequence[float], query: Tensor, keys: int) -> Tensor:
        """`[heads of this rank, 1, keys]`: slope * key position, which differs by a constant per query from ALiBi's."""
        from megatron.core.parallel_state import get_tensor_model_parallel_rank

        heads = query.shape[1]
        first = get_tensor_model_parallel_rank() * heads
        own = torch.tensor(slopes[first : first + heads], dtype=torch.float32, device=query.device)
        # Counted back from the last key, so that what a query sees most of stays near zero.
        return own[:, None, None] * torch.arange(1 - keys, 1, device=query.device)


def _sinks(config: TransformerConfig) -> nn.Parameter:
    """A score for each of this rank's heads."""
    heads = config.num_attention_heads // config.tensor_model_parallel_size
    sinks = nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
    if config.perform_initialization and config.init_method is not None:
        config.init_method(sinks)
    set_tensor_model_parallel_attributes(sinks, True, 0, 1)
    return sinks


def _part(hidden: Tensor | None, queries: slice, keys: slice) -> Tensor | None:
    """Some queries' and keys' part of a mask that is broadcast to `[batch, heads, queries, keys]`."""
    if hidden is None:
        return None
    return hidden[..., queries if hidden.shape[-2] > 1 else slice(None), keys if hidden.shape[-1] > 1 else slice(None)]
