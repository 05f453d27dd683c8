"""Megatron-Core's communicators between modules, for samples that differ in their number of features.

Core divides what passes from one replica to several, and what several send to one, in equal parts. Samples have as many
features as they have images; here each replica gets those of its own samples.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.comm.colocated_communicator import BridgeDirection, ColocatedBridgeCommunicator
from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator, CommRole
from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator
from torch import Tensor


def of_whole_sequences(grid: HyperCommGrid) -> HyperCommGrid:
    """A module's grid as Megatron-Core's communicators take it, which know no context parallelism.

    Ranks that share sequences get all features of them, as tensor-parallel ranks do; in a grid they are neighbours.
    """
    sizes = dict(zip(grid.dim_names, grid.shape, strict=True))
    sizes |= {"tp": sizes["tp"] * sizes["cp"], "cp": 1}
    return HyperCommGrid([*sizes.values()], [*sizes], rank_offset=grid.rank_offset)


class UnevenBridge(BridgeCommunicator):
    """Between modules on ranks of their own: remembers how many rows each sender gave, for the way back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._rows: deque[list[int]] = deque()
        super().__init__(*args, **kwargs)

    def _communicate_shapes(self, *args: Any, **kwargs: Any) -> Any:
        forward, backward = super()._communicate_shapes(*args, **kwargs)
        if len(forward) > 1:
            self._rows.append([shape[self._batch_dim] for shape in forward])
        return forward, backward

    def _split_tensor_at_batch_dim(self, aggregated_tensor: Tensor, num_splits: int) -> list[Tensor]:
        here = self.comm_map.get(self.current_rank)
        if num_splits > 1 and here is not None and here.role is CommRole.RECEIVER and self._rows:
            parts = torch.split(aggregated_tensor, self._rows.popleft(), dim=self._batch_dim)
            return [part.contiguous() for part in parts]
        split: list[Tensor] = super()._split_tensor_at_batch_dim(aggregated_tensor, num_splits)
        return split

    def forget(self) -> None:
        """Forget what was received without a way back, as in evaluation."""
        self._rows.clear()


class UnevenPipeline(MultiModulePipelineCommunicator):
    """Megatron-Core's communicator of a pipeline over several modules, with bridges that divide by samples."""

    def _build_bridge_comms(self) -> None:
        for source, grid in self.module_to_grid_map.items():
            for target in self.topology[source]:
                self.bridge_comms.append(
                    UnevenBridge(
                        src_grid=grid,
                        dest_grid=of_whole_sequences(self.module_to_grid_map[target]),
                        dim_mapping=self.dim_mapping,
                        comm_dtype=self.config.pipeline_dtype,
                        src_module_name=source,
                        dest_module_name=target,
                        tensor_ndim=self.module_output_ndim.get(source, 3),
                    )
                )

    def forget(self) -> None:
        """See `UnevenBridge.forget`."""
        for bridge in self.bridge_comms:
            bridge.forget()


class UnevenColocated(ColocatedBridgeCommunicator):
    """Between modules on the same ranks: each replica of the side with more of them has the rows of its own samples."""

    rows_of_samples: Sequence[int] | None = None

    @property
    def rows(self) -> list[int]:
        """Rows of each replica that this rank's wider batch is divided among."""
        assert self.rows_of_samples is not None
        each = len(self.rows_of_samples) // self.scale
        return [sum(self.rows_of_samples[part * each : (part + 1) * each]) for part in range(self.scale)]

    @property
    def slot(self) -> int:
        """Which of these replicas this rank belongs to."""
        position = self.rank_to_dest_pos if self.is_fan_out() else self.rank_to_src_pos
        return int(position[self.current_rank][0]) % int(self.scale)

    def communicate(self, tensor: Tensor) -> Tensor:
        """Rows [rows, hidden] of this rank's source batch -> those of its target batch, and the same for gradients."""
        if self.direction is BridgeDirection.EQUAL:
            return tensor
        passed: Tensor = _Passed.apply(tensor, self, self.rows, self.slot)
        return passed


class _Passed(torch.autograd.Function):
    """One way is to cut out a part, the other to gather all parts; each is the other's way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, bridge: UnevenColocated, rows: list[int], slot: int) -> Tensor:
        ctx.bridge, ctx.rows, ctx.slot = bridge, rows, slot
        return _cut(tensor, rows, slot) if bridge.is_fan_out() else _gathered(tensor, bridge.gather_pg, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        back = _gathered(gradient, ctx.bridge.gather_pg, ctx.rows) if ctx.bridge.is_fan_out() else None
        return _cut(gradient, ctx.rows, ctx.slot) if back is None else back, None, None, None


def _cut(tensor: Tensor, rows: Sequence[int], slot: int) -> Tensor:
    start = sum(rows[:slot])
    return tensor[start : start + rows[slot]].contiguous()


def _gathered(tensor: Tensor, group: Any, rows: Sequence[int]) -> Tensor:
    """All parts, one after another. Parts travel padded to the longest."""
    longest = max(rows)
    padded = tensor.new_zeros(longest, tensor.shape[1])
    padded[: len(tensor)] = tensor
    received = tensor.new_empty(longest * len(rows), tensor.shape[1])
    dist.all_gather_into_tensor(received, padded, group=group)
    return torch.cat([received[part * longest : part * longest + count] for part, count in enumerate(rows)])
