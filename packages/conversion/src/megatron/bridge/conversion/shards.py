"""Shard rules: how tensor- and expert-parallel ranks divide a Megatron tensor. Data only, no process group.

Megatron-Core's own layouts: column-parallel weights are cut along axis 0, row-parallel along axis 1, and a gated MLP's
first projection holds a cut of the gate followed by a cut of the up projection on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

from megatron.bridge.conversion.transforms import Region, Shape, whole


@dataclass(frozen=True)
class Blocks:
    """`axis` holds `count` equal blocks; every rank holds its cut of each block, one after another."""

    axis: int
    count: int = 1

    def local_shape(self, shape: Shape, size: int) -> Shape:
        """Shape on each of `size` ranks of a tensor of global `shape`."""
        return (*shape[: self.axis], shape[self.axis] // size, *shape[self.axis + 1 :])

    def global_shape(self, local: Shape, size: int) -> Shape:
        """Global shape of a tensor of which each of `size` ranks holds `local`."""
        return (*local[: self.axis], local[self.axis] * size, *local[self.axis + 1 :])

    def divides(self, shape: Shape, size: int) -> bool:
        """Whether `size` ranks can hold equal parts."""
        return shape[self.axis] % (self.count * size) == 0

    def regions(self, shape: Shape, rank: int, size: int) -> list[Region]:
        """The regions of the global tensor that `rank` of `size` holds, in the order it holds them along `axis`."""
        block = shape[self.axis] // self.count
        part = block // size
        starts = (index * block + rank * part for index in range(self.count))
        full = whole(shape)
        return [(*full[: self.axis], (start, start + part), *full[self.axis + 1 :]) for start in starts]

    def split(self, tensor: "torch.Tensor", size: int) -> "list[torch.Tensor]":
        """The local tensors of all ranks."""
        import torch

        blocks = [block.chunk(size, self.axis) for block in tensor.chunk(self.count, self.axis)]
        return [torch.cat([block[rank] for block in blocks], self.axis) for rank in range(size)]

    def join(self, parts: "Sequence[torch.Tensor]") -> "torch.Tensor":
        """The global tensor of all ranks' local tensors."""
        import torch

        if len(parts) == 1:
            return parts[0]
        cut = [part.chunk(self.count, self.axis) for part in parts]
        return torch.cat([blocks[index] for index in range(self.count) for blocks in cut], self.axis)


@dataclass(frozen=True)
class Replicated:
    """Every tensor-parallel rank holds the whole tensor."""

    def local_shape(self, shape: Shape, size: int) -> Shape:
        return shape

    def global_shape(self, local: Shape, size: int) -> Shape:
        return local

    def divides(self, shape: Shape, size: int) -> bool:
        return True

    def regions(self, shape: Shape, rank: int, size: int) -> list[Region]:
        return [whole(shape)]

    def split(self, tensor: "torch.Tensor", size: int) -> "list[torch.Tensor]":
        return [tensor] * size

    def join(self, parts: "Sequence[torch.Tensor]") -> "torch.Tensor":
        return parts[0]


@dataclass(frozen=True)
class Expert:
    """A weight of one expert: held by one expert-parallel rank, and there divided by expert-tensor-parallel ranks.

    Experts are spread in equal runs: rank r of R holds experts r * E / R and following. Sizes and ranks in the methods
    are those of expert-tensor parallelism, which follow `inner`.
    """

    inner: Blocks | Replicated

    def local_shape(self, shape: Shape, size: int) -> Shape:
        return self.inner.local_shape(shape, size)

    def global_shape(self, local: Shape, size: int) -> Shape:
        return self.inner.global_shape(local, size)

    def divides(self, shape: Shape, size: int) -> bool:
        return self.inner.divides(shape, size)

    def regions(self, shape: Shape, rank: int, size: int) -> list[Region]:
        return self.inner.regions(shape, rank, size)

    def split(self, tensor: "torch.Tensor", size: int) -> "list[torch.Tensor]":
        return self.inner.split(tensor, size)

    def join(self, parts: "Sequence[torch.Tensor]") -> "torch.Tensor":
        return self.inner.join(parts)


type ShardRule = Blocks | Replicated | Expert


def cut_axis(rule: ShardRule) -> int:
    """The axis along which a rank's regions follow one another; 0 for a weight that is not cut."""
    inner = rule.inner if isinstance(rule, Expert) else rule
    return inner.axis if isinstance(inner, Blocks) else 0


def is_column(rule: ShardRule) -> bool:
    """Whether the ranks' parts, one after another in memory, are the whole weight."""
    return (rule.inner if isinstance(rule, Expert) else rule) == COLUMN


REPLICATED = Replicated()
COLUMN = Blocks(0)
ROW = Blocks(1)
GATED_COLUMN = Blocks(0, 2)
