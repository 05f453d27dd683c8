"""Collectives with parts of unequal size, as NCCL has them and gloo has not.

Tokens are spread unequally over experts, so a mixture of experts gathers and scatters unequal parts. Used by the CPU
layer, which puts these in the place of torch's functions of the same names.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def all_gather(torchs_own: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.distributed.all_gather` that also takes outputs of unequal sizes."""
    import torch.distributed as dist

    @functools.wraps(torchs_own)
    def gather(
        tensor_list: "list[torch.Tensor]", tensor: "torch.Tensor", group: Any = None, async_op: bool = False
    ) -> Any:
        if _equal(tensor_list):
            return torchs_own(tensor_list, tensor, group=group, async_op=async_op)
        for rank, part in enumerate(tensor_list):
            if rank == dist.get_rank(group):
                part.copy_(tensor)
            if part.numel():
                dist.broadcast(part, group=group, group_src=rank)
        return None

    return gather


def reduce_scatter(torchs_own: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.distributed.reduce_scatter` that also takes inputs of unequal sizes."""
    import torch.distributed as dist

    @functools.wraps(torchs_own)
    def scatter(
        output: "torch.Tensor",
        input_list: "list[torch.Tensor]",
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if _equal(input_list):
            return torchs_own(output, input_list, op=op, group=group, async_op=async_op)
        for rank, part in enumerate(input_list):
            reduced = part.clone()
            if part.numel():
                dist.reduce(reduced, group=group, group_dst=rank, op=op)
            if rank == dist.get_rank(group):
                output.copy_(reduced)
        return None

    return scatter


def all_to_all_single(torchs_own: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.distributed.all_to_all_single` that also takes split sizes as tensors.

    Megatron-Core turns them into lists on their way from a GPU only.
    """
    import torch

    @functools.wraps(torchs_own)
    def exchange(*args: Any, **kwargs: Any) -> Any:
        for name in ("output_split_sizes", "input_split_sizes"):
            if isinstance(sizes := kwargs.get(name), torch.Tensor):
                kwargs[name] = sizes.tolist()
        return torchs_own(*args, **kwargs)

    return exchange


def _equal(parts: "Sequence[torch.Tensor]") -> bool:
    return len({part.shape for part in parts}) <= 1
