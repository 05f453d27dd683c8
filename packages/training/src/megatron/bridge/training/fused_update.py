"""torch's Adam on a CPU, updated in one pass over weights, gradients and moments.

Megatron-Core takes torch's AdamW where there is no Transformer Engine, and leaves it at torch's default for CPUs: a
dozen passes, one for each operation.
"""

from typing import Any

from megatron.bridge.training.optimizer_state import torch_adams


def fuse_updates(optimizer: Any) -> None:
    """Have torch's Adam in one of Megatron-Core's optimizers use torch's fused kernel for weights on a CPU."""
    for group in (group for inner in torch_adams(optimizer) for group in inner.param_groups):
        if all(parameter.device.type == "cpu" for parameter in group["params"]):
            group["fused"] = True
