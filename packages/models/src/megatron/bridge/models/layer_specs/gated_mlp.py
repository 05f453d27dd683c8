"""The MLP of the `torch` layer spec: a gated activation in one step, with a backward of its own.

Megatron-Core's plain path keeps three tensors of the MLP's width for the backward, adds an offset of zero, and joins
the gradients of the two halves by a copy. One function keeps its input alone and writes each half where it belongs. On
a CPU, where work on the halves of a tensor takes up to twice the time of work on a tensor, they are projected apart.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.bridge.models.layer_specs.gate_and_up_cpu import GateAndUpLinear

type Activation = Callable[[Tensor], Tensor]


class GatedMLP(MLP):
    """Megatron-Core's MLP for `act(gate) * up`; anything beside that is left to Megatron-Core."""

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, *args: Any, **kwargs: Any) -> None:
        if config.gated_linear_unit and submodules.linear_fc1 is ColumnParallelLinear:
            submodules = dataclasses.replace(submodules, linear_fc1=GateAndUpLinear)
        super().__init__(config, submodules, *args, **kwargs)
        clamped = config.activation_func_clamp_value is not None or config.glu_linear_offset != 0.0
        self.own_activation = config.gated_linear_unit and not (
            clamped or config.bias_activation_fusion or config.use_te_activation_func
        )
        if self.own_activation:
            # By this field alone Megatron-Core hands gate and up projection to the activation as one. Other modules
            # read it too: the change is this module's.
            self.config = copy.copy(config)
            self.config.use_te_activation_func = True
            self.activation_func = _Gated(config.activation_func)

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any) -> Any:
        """As Megatron-Core's."""
        if per_token_scale is None and self._projects_apart(hidden_states):
            return self.linear_fc2(self.activation_func.of_parts(*self.linear_fc1(hidden_states, apart=True)))
        return super().forward(hidden_states, per_token_scale, **kwargs)

    def _projects_apart(self, hidden_states: Tensor) -> bool:
        # An adapter around the layer, which is then of another type, adds to its whole output.
        first = self.linear_fc1
        return self.own_activation and type(first) is GateAndUpLinear and first.divides(hidden_states)


class _Gated:
    """`[..., gate and up] -> [..., width]`. Not a module: it has no weights, and no place in a checkpoint."""

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def __call__(self, gate_and_up: Tensor) -> Tensor:
        output: Tensor = _GatedActivation.apply(gate_and_up, self.activation)
        return output

    def of_parts(self, gate: Tensor, up: Tensor) -> Tensor:
        """The same, of two tensors."""
        output: Tensor = _GatedActivationOfParts.apply(gate, up, self.activation)
        return output


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        ctx.activation = activation
        gate, up = gate_and_up.chunk(2, dim=-1)
        return activation(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (gate_and_up,) = ctx.saved_tensors
        result = torch.empty_like(gate_and_up)
        to_gate, to_up = result.chunk(2, dim=-1)
        gate, up = gate_and_up.chunk(2, dim=-1)
        to_gate.copy_(_gradients(gate, up, gradient, ctx.activation, to_up)[0])
        return result, None


class _GatedActivationOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *_gradients(gate, up, gradient, ctx.activation), None


def _gradients(
    gate: Tensor, up: Tensor, gradient: Tensor, activation: Activation, to_up: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of gate and up; that of up is written to `to_up` where it is given."""
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        activated = activation(leaf)
    to_up = torch.mul(gradient, activated.detach(), out=to_up)
    return torch.autograd.grad(activated, leaf, gradient * up)[0], to_up
