"""Self-attention whose output is gated, without a compiler."""

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor


class GatedAttention(SelfAttention):
    """Megatron-Core's self-attention; its own gate is compiled when first used, and needs a C++ compiler on a CPU."""

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        return (x * torch.sigmoid(gate.reshape(x.shape).float())).to(x.dtype)
