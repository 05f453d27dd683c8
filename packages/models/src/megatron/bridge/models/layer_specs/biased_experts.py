"""Experts with biases, trained without Transformer Engine and divided over expert-tensor-parallel ranks."""

import dataclasses
import functools
from typing import Any

from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch import Tensor


class FreshRowParallelLinear(RowParallelLinear):
    """An expert's projection whose output is a tensor of its own.

    Megatron-Core adds the bias to it in place, which autograd forbids on the view that its own projection gives. And
    it would add up the bias's gradients over tensor-parallel ranks under sequence parallelism, though that has been
    done already: whole experts are replicas of one another.

    Ranks that divide an expert each give a part of its output, and the parts are added up later. So each adds its part
    of the bias; every rank has the bias' whole gradient, as it sees all of the expert's tokens.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.bias is not None:
            self.bias.sequence_parallel = False

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        ranks = self.tp_group.size()
        if bias is not None and ranks > 1:
            bias = bias.detach() / ranks + (bias - bias.detach())
        return output.clone(), bias


def with_fresh_outputs(mixture: Any) -> Any:
    """A mixture of experts' `partial` whose routed experts end in `FreshRowParallelLinear`."""
    parts = mixture.keywords["submodules"]
    layers = dataclasses.replace(parts.experts.keywords["submodules"], linear_fc2=FreshRowParallelLinear)
    return _with(mixture, dataclasses.replace(parts, experts=_with(parts.experts, layers)))


def _with(part: Any, submodules: Any) -> Any:
    return functools.partial(part.func, *part.args, **{**part.keywords, "submodules": submodules})
