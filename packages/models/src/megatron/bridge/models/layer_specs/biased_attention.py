"""Core attention with a bias on the scores, such as T5's relative positions."""

from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs.sdpa_attention import SDPAttention


class BiasedAttention(SDPAttention):
    """`SDPAttention` that adds a bias to the scores after they are scaled."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """As `SDPAttention`'s, with `attention_bias` broadcast to `[batch, this rank's heads, queries, keys]`."""
        if attention_bias is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type, None, packed_seq_params)
        if packed_seq_params is not None:
            raise BridgeError("relative positions count within one document: packed sequences are not supported")
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        bias = attention_bias.to(query.dtype)
        seen = self.visible(query.shape[2], key.shape[2], attention_mask, query.device)
        if seen is not None:
            bias = bias.masked_fill(~seen, -float("inf"))
        with self._dropout_generator() as probability:
            attended = scaled_dot_product_attention(
                query, key, value, attn_mask=bias, dropout_p=probability, scale=self.softmax_scale
            )
        return attended.permute(2, 0, 1, 3).flatten(2)
