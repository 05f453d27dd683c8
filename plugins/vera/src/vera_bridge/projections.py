"""The two frozen random matrices that all layers share."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.bridge.errors import BridgeError
from megatron.bridge.peft.adapted_layer import adapted_layers
from megatron.bridge.peft.adapter import reference_weight
from vera_bridge.adapter import Vectors

if TYPE_CHECKING:
    from vera_bridge.method import VeRA


def projections(dim: int, inputs: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """A [dim, inputs] and B [outputs, dim], float32 on the CPU: bit for bit what peft makes of the same numbers."""
    source = torch.Generator().manual_seed(seed)
    narrowing = torch.nn.init.kaiming_uniform_(torch.empty(dim, inputs), generator=source)
    expanding = torch.nn.init.kaiming_uniform_(torch.empty(outputs, dim), generator=source)
    return narrowing, expanding


def share(method: "VeRA", chunks: "list[torch.nn.Module]") -> None:
    """Give each layer of `method` its part of the matrices; what layers have in common is held once. Collective.

    Raises:
        BridgeError: the matrices are not as large as `method.projection_sizes` says.
    """
    held = [
        (layer, layer.adapters[method.adapter_name])
        for layer in adapted_layers(chunks)
        if method.adapter_name in layer.adapters
    ]
    adapters = [(layer, each) for layer, each in held if isinstance(each, Vectors)]
    sizes = _largest([each for _, each in adapters])
    if method.projection_sizes not in (None, sizes):
        raise BridgeError(
            f"the adapter's shared matrices are for {method.projection_sizes} inputs and outputs, and the largest of "
            f"its layers here have {sizes}: it was made for other layers, or together with another adapter"
        )
    narrowing, expanding = projections(method.dim, sizes[0], sizes[1], method.seed)
    for layer, adapter in adapters:
        weight = reference_weight(layer)
        narrowing, expanding = (each.to(weight.device, weight.dtype) for each in (narrowing, expanding))
        adapter.take(narrowing, expanding)


def _largest(adapters: list[Vectors]) -> list[int]:
    """The most inputs and outputs over all pipeline stages. Collective over the ranks that share the model."""
    from megatron.core import parallel_state

    from megatron.bridge.platform import device

    own: list[Any] = [each.sizes for each in adapters]
    largest = torch.tensor([max(sizes) for sizes in zip(*own, strict=True)] or [0, 0], device=device())
    torch.distributed.all_reduce(
        largest, op=torch.distributed.ReduceOp.MAX, group=parallel_state.get_model_parallel_group()
    )
    inputs, outputs = largest.tolist()
    return [inputs, outputs]
