"""The whole weight of a divided layer, on every rank."""

from typing import Any

import torch
from torch import Tensor

from megatron.bridge.conversion.shards import Blocks
from megatron.bridge.peft.divided_layer import Division


def whole_weight(layer: Any, division: Division) -> Tensor:
    """`[outputs, inputs]`. Collective over the layer's ranks."""
    weight: Tensor = layer.weight.detach()
    shard = Blocks(1) if division.kind == "row" else Blocks(0, division.blocks)
    if division.size == 1:
        return weight
    parts = [torch.empty_like(weight) for _ in range(division.size)]
    torch.distributed.all_gather(parts, weight.contiguous(), group=division.group)
    return shard.join(parts)
