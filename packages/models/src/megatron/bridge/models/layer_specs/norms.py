"""The norms of the `torch` layer spec: PyTorch's own, marked for Megatron's sequence parallelism."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron.bridge.models.layer_specs.rms_norm_cpu import RMSNorm

NORMS: dict[str, type[nn.Module]] = {"LayerNorm": nn.LayerNorm, "RMSNorm": RMSNorm}


class ZeroCenteredRMSNorm(nn.RMSNorm):
    """RMSNorm by 1 + weight. The sum is taken in fp32, where a small weight is not lost beside the 1."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 + self.weight.float()
        return nn.functional.rms_norm(x.float(), self.normalized_shape, scale, self.eps).to(x.dtype)


class ZeroCenteredLayerNorm(nn.LayerNorm):
    """LayerNorm by 1 + weight, as `ZeroCenteredRMSNorm`."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        scale = 1 + self.weight.float()
        return nn.functional.layer_norm(x.float(), self.normalized_shape, scale, bias, self.eps).to(x.dtype)


_ZERO_CENTERED: dict[str, type[nn.Module]] = {"LayerNorm": ZeroCenteredLayerNorm, "RMSNorm": ZeroCenteredRMSNorm}


def torch_norm(
    config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, weight: bool = True, bias: bool = True
) -> nn.Module:
    """The norm that `config.normalization` names, over a last axis of `hidden_size`.

    Under sequence parallelism every rank sees some of the tokens only, so that the gradients of a norm's weights are
    partial sums; Megatron-Core adds up those of parameters that carry `sequence_parallel = True`.

    Args:
        config: of the model.
        hidden_size: channels.
        eps: added to the variance.
        weight: whether the norm has a weight (and a LayerNorm a bias) at all.
        bias: whether a LayerNorm has a bias.
    """
    classes = _ZERO_CENTERED if config.layernorm_zero_centered_gamma and weight else NORMS
    extra = {"bias": bias} if config.normalization == "LayerNorm" else {}
    norm = classes[config.normalization](hidden_size, eps=eps, elementwise_affine=weight, **extra)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """The last axis by its root mean square, in fp32 and without a weight."""
    return nn.functional.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


class ProjectionNorm(nn.Module):
    """A norm of queries or keys with a weight for each channel of each head.

    Every tensor-parallel rank holds the whole weight and uses its heads' part, so that Megatron-Core's sum of the
    gradients of `q_layernorm` and `k_layernorm` over those ranks is the gradient.

    Args:
        config: of the model.
        hidden_size: channels of a head.
        eps: added to the variance.
        heads: of the whole model.
        whole: the norm spans all heads (of all ranks), and its weight is flat; otherwise each head by itself.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, heads: int, whole: bool) -> None:
        super().__init__()
        self.heads, self.size, self.eps, self.whole = heads, hidden_size, eps, whole
        self.centered = config.normalization == "LayerNorm"
        self.ranks = config.tensor_model_parallel_size
        self.weight = nn.Parameter(torch.ones(heads * hidden_size) if whole else torch.ones(heads, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., this rank's heads, size]` in and out."""
        values = x.float()
        if self.centered:
            values = values - self._mean(values)
        values = values * torch.rsqrt(self._mean(values.square()) + self.eps)
        return (self._own_weight(x.shape[-2]) * values).to(x.dtype)

    def _mean(self, values: Tensor) -> Tensor:
        if not self.whole:
            return values.mean(-1, keepdim=True)
        total = values.sum((-2, -1), keepdim=True)
        if self.ranks > 1:
            # Its gradient is a sum over the ranks too, because every rank's output depends on it.
            total = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(total))
        return total / (values.shape[-2] * values.shape[-1] * self.ranks)

    def _own_weight(self, heads: int) -> Tensor:
        from megatron.core.parallel_state import get_tensor_model_parallel_rank

        # With fewer key heads than ranks, several ranks have the same one.
        first = get_tensor_model_parallel_rank() * self.heads // self.ranks
        return self.weight.view(self.heads, self.size)[first : first + heads]


class RowParallelLinearWithNorm(RowParallelLinear):
    """A projection with a norm behind it. Its bias is added before the norm."""

    def __init__(self, *args: Any, norm: Callable[..., nn.Module], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.post_layernorm = norm(self.config, self.output_size, self.config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        output, bias = super().forward(input_)
        return self.post_layernorm(output if bias is None else output + bias), None
