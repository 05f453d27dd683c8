"""xIELU, an activation with trained parameters (arXiv:2411.13010)."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import softplus


class XIELU(MegatronModule):
    """a_p x^2 + beta x above zero, a_n (e^min(x, eps) - 1 - x) + beta x below, where a_p and a_n are trained.

    Every tensor-parallel rank has a part of the channels and a copy of the parameters; their gradients are added up.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.ranks = config.tensor_model_parallel_size
        place = {"dtype": config.params_dtype}
        start = torch.log(torch.expm1(torch.tensor([0.8])))
        self.alpha_p = nn.Parameter(start.to(**place))
        self.alpha_n = nn.Parameter(torch.log(torch.expm1(torch.tensor([0.8 - 0.5]))).to(**place))
        self.beta = nn.Buffer(torch.tensor(0.5, **place))
        self.eps = nn.Buffer(torch.tensor(-1e-6, **place))

    def forward(self, x: Tensor) -> Tensor:
        alpha_p, alpha_n = self.alpha_p, self.alpha_n
        if self.ranks > 1:
            alpha_p, alpha_n = (copy_to_tensor_model_parallel_region(alpha) for alpha in (alpha_p, alpha_n))
        above = softplus(alpha_p) * x * x
        below = (torch.expm1(torch.minimum(x, self.eps)) - x) * (self.beta + softplus(alpha_n))
        return torch.where(x > 0, above, below) + self.beta * x


def mlp_with_xielu(build: Callable[..., Any], *, config: TransformerConfig, **kwargs: Any) -> Any:
    """An MLP, built by `build`, whose activation is an `XIELU` of its own."""
    mlp = build(config=config, **kwargs)
    mlp.activation_func = XIELU(config).to(next(mlp.parameters()).device)
    return mlp
