"""The core attention of the `torch` layer spec: `torch.nn.functional.scaled_dot_product_attention`.

It takes the place of Megatron-Core's `DotProductAttention` and never builds a matrix of scores where PyTorch's fused
kernels can do without: causal attention and packed documents need no mask at all. Softmax is computed in fp32 by those
kernels whatever the activations' type, which is what `attention_softmax_in_fp32` asks for.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs.causal_attention_cpu import blocked_causal_attention, fits
from megatron.bridge.models.layer_specs.context_parallel import attend_from_chunks, attend_packed_from_chunks
from megatron.bridge.models.layer_specs.packed_documents import document_bounds, document_spans

# Mask types under which a query sees no later key.
_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)


class SDPAttention(MegatronModule):
    """Scaled dot-product attention over this rank's heads, without parameters.

    Queries may be shorter than keys (a key-value cache): the last query is then aligned with the last key.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        # Part of Megatron-Core's contract, of no effect here.
        del attention_type, k_channels, v_channels, cp_comm_type
        self.attn_mask_type = attn_mask_type
        self.layer_number = layer_number
        self.context_group = self._context_group(pg_collection)
        self.softmax_scale = softmax_scale  # None means 1 / sqrt(head size)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, max(1, layer_number))
        self.window = _window(config.window_size) if windowed else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: `[queries, batch, heads, size]`; packed: `[tokens, heads, size]`.
            key, value: the same with `keys` and with as many heads or fewer (grouped queries); values may be of
                another size.
            attention_mask: True where a query must *not* see a key (Megatron's convention), broadcast to
                `[batch, heads, queries, keys]`; it is added to what the mask type and the window hide.
            attn_mask_type: accepted for Megatron-Core, which turns it off when it decodes from a cache. The layer's
                own type holds, aligned with the last key, which says the same and is right for several tokens too.
            packed_seq_params: the documents' bounds of a packed batch (`thd`).

        Returns:
            `[queries, batch, heads * size of values]`; packed: `[tokens, heads * size of values]`.
        """
        del attn_mask_type
        if attention_bias is not None:
            raise BridgeError("the layer spec 'torch' has no attention bias; use layer_spec='transformer_engine'")
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            if self.context_group is not None:
                bounds = document_bounds(packed_seq_params)
                return attend_packed_from_chunks(self._attend, query, key, value, bounds, self.context_group)
            return self._attend_packed(query, key, value, packed_seq_params)
        if self.context_group is not None:
            return attend_from_chunks(self._attend, query, key, value, attention_mask, self.context_group)
        # [s, b, h, d] -> [b, h, s, d] and back: views only, the kernels take any strides.
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        return self._attend(query, key, value, attention_mask).permute(2, 0, 1, 3).flatten(2)

    def _context_group(self, groups: ProcessGroupCollection | None) -> Any:
        """The ranks that share every sequence; None where this rank has the whole of it."""
        if self.config.context_parallel_size == 1:
            return None
        if self.attn_mask_type not in _CAUSAL:
            raise BridgeError(
                f"context_parallel_size={self.config.context_parallel_size} needs causal attention with the layer spec "
                "'torch'; set it to 1, or use layer_spec='transformer_engine'"
            )
        if groups is not None and hasattr(groups, "cp"):
            return groups.cp
        return parallel_state.get_context_parallel_group()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
        """`[batch, heads, queries, size]` in and out; `hidden` is True where a query must not see a key."""
        queries, keys = query.shape[2], key.shape[2]
        causal = self.attn_mask_type in _CAUSAL and queries > 1
        if causal and queries > keys:
            raise BridgeError(
                f"causal attention of {queries} queries to only {keys} keys: each query needs its own key"
            )
        plain_causal = causal and hidden is None and self.window is None and queries == keys
        if plain_causal and not (self.training and self.dropout) and fits(query):
            return blocked_causal_attention(query, key, value, self.softmax_scale)
        seen = None
        if not plain_causal:
            seen = self.visible(queries, keys, hidden, query.device)
        with self._dropout_generator() as probability:
            return scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=seen,
                dropout_p=probability,
                is_causal=plain_causal,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )

    def visible(self, queries: int, keys: int, hidden: Tensor | None, device: torch.device) -> Tensor | None:
        """True where a query sees a key, broadcast to `[batch, heads, queries, keys]`; None: all do."""
        causal = self.attn_mask_type in _CAUSAL and queries > 1
        band = _band(queries, keys, causal, self.window, device)
        return band if hidden is None else ~hidden if band is None else band & ~hidden

    def _attend_packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        """Each document attends to itself alone; padding between and behind documents comes out as zeros."""
        pieces = []
        end = 0
        for start, stop in document_spans(packed, tokens=query.shape[0]):
            if start > end:
                pieces.append(query.new_zeros(start - end, query.shape[1], value.shape[2]))
            # [t, h, d] -> [1, h, t, d]
            q, k, v = (tensor[start:stop].transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
            pieces.append(self._attend(q, k, v, hidden=None).squeeze(0).transpose(0, 1))
            end = stop
        if end < query.shape[0]:
            pieces.append(query.new_zeros(query.shape[0] - end, query.shape[1], value.shape[2]))
        return torch.cat(pieces).flatten(1)

    @contextlib.contextmanager
    def _dropout_generator(self) -> Iterator[float]:
        """The dropout probability in force, under Megatron's generator: ranks drop their own heads independently."""
        if not self.training or self.dropout == 0.0:
            yield 0.0
        elif self.config.sequence_parallel:
            # The surrounding generator differs between ranks already.
            yield self.dropout
        else:
            with get_cuda_rng_tracker().fork():
                yield self.dropout


def _window(size: tuple[int, int] | None) -> tuple[int | None, int | None]:
    """Megatron's (left, right) window with its -1 for "no bound" as None."""
    left, right = size or (-1, -1)
    return (None if left < 0 else left), (None if right < 0 else right)


def _band(
    queries: int, keys: int, causal: bool, window: tuple[int | None, int | None] | None, device: torch.device
) -> Tensor | None:
    """`[queries, keys]`, True where a query sees a key, the last query standing at the last key; None: all do."""
    left, right = window or (None, None)
    if causal:
        right = 0
    if left is None and right is None:
        return None
    # How far each key lies before (negative) or behind its query.
    offset = torch.arange(keys, device=device) - torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    seen = torch.ones_like(offset, dtype=torch.bool)
    if left is not None:
        seen &= offset >= -left
    if right is not None:
        seen &= offset <= right
    return seen
