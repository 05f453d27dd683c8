"""The MLP of the `torch` layer spec: a gated activation in one step, with a backward of its own.

Megatron-Core's plain path keeps three tensors of the MLP's width for the backward, adds an offset of zero, and joins
the gradients of the two halves by a copy. One function keeps its input alone and writes each half where it belongs.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class GatedMLP(MLP):
    """Megatron-Core's MLP for `act(gate) * up`; anything beside that is left to Megatron-Core."""

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        clamped = config.activation_func_clamp_value is not None or config.glu_linear_offset != 0.0
        if config.gated_linear_unit and not (clamped or config.bias_activation_fusion or config.use_te_activation_func):
            # By this field alone Megatron-Core hands gate and up projection to the activation as one. Other modules
            # read it too: the change is this module's.
            self.config = copy.copy(config)
            self.config.use_te_activation_func = True
            self.activation_func = _Gated(config.activation_func)


class _Gated:
    """`[..., gate and up] -> [..., width]`. Not a module: it has no weights, and no place in a checkpoint."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        self.activation = activation

    def __call__(self, gate_and_up: Tensor) -> Tensor:
        output: Tensor = _GatedActivation.apply(gate_and_up, self.activation)
        return output


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        ctx.activation = activation
        gate, up = gate_and_up.chunk(2, dim=-1)
        return activation(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        to_gate, to_up = result.chunk(2, dim=-1)
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.activation(leaf)
        torch.mul(gradient, activated.detach(), out=to_up)
        to_gate.copy_(torch.autograd.grad(activated, leaf, gradient * up)[0])
        return result, None
