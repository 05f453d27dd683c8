"""BitFit (https://arxiv.org/abs/2106.10199): only the biases train, a few thousandths of a model."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.peft.base import PEFT

if TYPE_CHECKING:
    import torch

# `bias`, and those of modules that hold more than one layer: `layer_norm_bias`, `bias0`.
_BIAS = re.compile(r"(\w+_)?bias\d*")


@dataclass(kw_only=True)
class BitFit(PEFT):
    """Train the biases of the target modules, or all biases there are: projections' and norms'.

    Bias gradients need no activations, so memory is that of the forward pass and the biases.
    """

    @property
    def requirement(self) -> str:
        return "BitFit trains biases, so the model must have some (Llama and Mistral have none, Qwen2 has QKV's)"

    def transform(self, module: "torch.nn.Module", name: str, prefix: str) -> "torch.nn.Module":
        if not self.is_target(name, prefix):
            return module
        biases = [each for own, each in module.named_parameters(recurse=False) if _BIAS.fullmatch(own)]
        for bias in biases:
            bias.requires_grad_(True)
        if biases:
            _let_bias_learn(module, f"{prefix}.{name}" if prefix else name)
        return module


def _let_bias_learn(module: "torch.nn.Module", full_name: str) -> None:
    """Have a column-parallel layer's bias added outside of it.

    With a frozen weight, Megatron-Core multiplies by an autograd function that returns no gradient for the bias it was
    given: that bias would silently never learn. One that the layer is told to skip is not given to it.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear

    if not isinstance(module, ColumnParallelLinear) or module.skip_bias_add:
        return
    if module.gather_output:
        raise BridgeError(
            f"BitFit cannot train the bias of {full_name!r}: with a frozen weight and gather_output=True Megatron-Core "
            "computes no gradient for it; leave it out by naming the others in target_modules"
        )
    module.skip_bias_add = True
    module.register_forward_hook(_add_bias)


def _add_bias(module: Any, inputs: Any, outputs: Any) -> Any:
    output, bias = outputs
    return output + bias, None
