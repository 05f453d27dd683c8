"""RMSNorm in fp32 on a CPU: forward and backward in a few passes over the activations.

PyTorch has no kernel for it there and composes it of fourteen operations, each of which reads and writes the
activations. Here sums over channels and over tokens are products of matrices and vectors.
"""

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """PyTorch's, with a backward of its own for fp32 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., channels]` in and out."""
        own = x.device.type == "cpu" and x.dtype == torch.float32 == getattr(self.weight, "dtype", None)
        if not own:
            return super().forward(x)
        epsilon = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        output: Tensor = _RMSNorm.apply(x, self.weight, epsilon)
        return output


class _RMSNorm(torch.autograd.Function):
    """y = x * r * w with r = (mean(x * x) + epsilon) ** -0.5 (Zhang and Sennrich, arXiv:1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factor = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return (x * factor).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, factor = ctx.saved_tensors
        channels = x.shape[-1]
        to_x = to_weight = None
        products = (gradient * x).reshape(-1, channels)
        if ctx.needs_input_grad[1]:
            to_weight = torch.mv(products.t(), factor.reshape(-1))
        if ctx.needs_input_grad[0]:
            # dx = r * w * dy - x * r ** 3 * sum(w * dy * x) / channels
            share = torch.mv(products, weight).view(factor.shape).mul_(factor.pow(3)).div_(-channels)
            to_x = (gradient * weight).mul_(factor).addcmul_(x, share)
        return to_x, to_weight, None
