"""A mixture of experts with something behind it."""

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn


class VariantMoELayer(MoELayer):
    """Megatron-Core's mixture of experts.

    Args:
        norm: builds a norm of what all experts, the shared ones included, give together.
        multiplier: factor on what they give.
    """

    def __init__(
        self, *args: Any, norm: Callable[..., nn.Module] | None = None, multiplier: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.multiplier = multiplier
        self.post_layernorm = norm and norm(self.config, self.config.hidden_size, self.config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(*args, **kwargs)
        output = output if self.multiplier == 1.0 else output * self.multiplier
        return output if self.post_layernorm is None else self.post_layernorm(output), bias
