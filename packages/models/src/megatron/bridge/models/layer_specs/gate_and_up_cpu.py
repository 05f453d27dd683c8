"""The projection of a gated MLP in fp32 on a CPU: gate and up as two tensors, from one weight."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor


class GateAndUpLinear(ColumnParallelLinear):
    """Megatron-Core's layer, which can give the halves of its output apart."""

    def divides(self, hidden_states: Tensor) -> bool:
        """Whether the halves can be had apart, and sooner: no rank has a part of them only, and nothing is added."""
        alone = self.output_size_per_partition == self.output_size and not self.sequence_parallel
        plain = self.bias is None and not self.config.defer_embedding_wgrad_compute
        here = hidden_states.device.type == "cpu" and hidden_states.dtype == self.weight.dtype == torch.float32
        return alone and plain and here

    def forward(self, input_: Tensor, *args: Any, apart: bool = False, **kwargs: Any) -> Any:
        """As Megatron-Core's; with `apart` the gate and the up projection, where `divides` allows it."""
        return _GateAndUp.apply(input_, self.weight) if apart else super().forward(input_, *args, **kwargs)


class _GateAndUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        gate, up = weight.chunk(2)
        return x @ gate.t(), x @ up.t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_gate: Tensor, to_up: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        parts = [gradient.flatten(0, -2) for gradient in (to_gate, to_up)]
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            gate, up = weight.chunk(2)
            to_x = (parts[0] @ gate).addmm_(parts[1], up).view(x.shape)
        if ctx.needs_input_grad[1]:
            to_weight = torch.empty_like(weight)
            for gradient, place in zip(parts, to_weight.chunk(2), strict=True):
                torch.mm(gradient.t(), x.flatten(0, -2), out=place)
        return to_x, to_weight
