"""A decoder layer whose attention and MLP may read the same input, and that may turn positions in its own way."""

from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.typed_torch import apply_module
from torch import Tensor


class VariantLayer(TransformerLayer):
    """Megatron-Core's layer; the model sets `parallel` and `rope_kind` after it has been built.

    Attributes:
        parallel: x + attention(norm(x)) + mlp(norm(x)) in place of two steps. Without a norm of its own the MLP reads
            attention's.
        rope_kind: which of several rotary embeddings `[kinds, sequence, 1, 1, size]` is this layer's.
        rope_size: how many of its channels are.
    """

    parallel: bool = False
    rope_kind: int | None = None
    rope_size: int | None = None

    def forward(self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:
        """As Megatron-Core's: `[sequence, batch, hidden]` in and out, with the context."""
        if self.rope_kind is not None and rotary_pos_emb is not None:
            rotary_pos_emb = rotary_pos_emb[self.rope_kind][..., : self.rope_size]
        if not self.parallel:
            return super().forward(hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        attended, context = self._forward_attention(hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        shared = isinstance(self.pre_mlp_layernorm, IdentityOp)
        norm = self.input_layernorm if shared else self.pre_mlp_layernorm
        output = apply_module(self.mlp)(apply_module(norm)(hidden_states))
        return self._forward_post_mlp(output, attended), context
