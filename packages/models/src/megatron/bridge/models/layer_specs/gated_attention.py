"""Attention whose output is gated (`attention_output_gate`), without the compiler that Megatron-Core's calls."""

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor


class GatedSelfAttention(SelfAttention):
    """`SelfAttention` with the gate as plain operations; the stock one is compiled at its first call."""

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        return (x * gate.reshape(x.shape).float().sigmoid()).to(x.dtype)
