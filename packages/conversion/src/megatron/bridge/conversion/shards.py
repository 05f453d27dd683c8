"""Shard rules: how tensor- and expert-parallel ranks divide a Megatron tensor. Data only, no process group.

Megatron-Core's own layouts: column-parallel weights are cut along axis 0, row-parallel along axis 1, and a gated MLP's
first projection holds a cut of the gate followed by a cut of the up projection on every rank. A state-space layer's
first projection holds several blocks of different sizes, each of which is cut by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

from megatron.bridge.conversion.transforms import Region, Shape, whole


@dataclass(frozen=True)
class Blocks:
    """`axis` holds blocks one after another; every rank holds its cut of each block, in the same order.

    Args:
        axis: of the tensor.
        parts: how many equal blocks there are, or the sizes of unequal ones (any multiple of them will do).
    """

    axis: int
    parts: int | tuple[int, ...] = 1

    def _blocks(self, total: int) -> list[int]:
        """Sizes of the blocks of an axis of `total`; whole numbers where `divides` says so."""
        ratio = (1,) * self.parts if isinstance(self.parts, int) else self.parts
        return [total * size // sum(ratio) for size in ratio]

    def local_shape(self, shape: Shape, size: int) -> Shape:
        """Shape on each of `size` ranks of a tensor of global `shape`."""
        return (*shape[: self.axis], shape[self.axis] // size, *shape[self.axis + 1 :])

    def global_shape(self, local: Shape, size: int) -> Shape:
        """Global shape of a tensor of which each of `size` ranks holds `local`."""
        return (*local[: self.axis], local[self.axis] * size, *local[self.axis + 1 :])

    def divides(self, shape: Shape, size: int) -> bool:
        """Whether `size` ranks can hold equal parts."""
        total = shape[self.axis]
        blocks = self._blocks(total)
        return sum(blocks) == total and all(block % size == 0 for block in blocks)

    def regions(self, shape: Shape, rank: int, size: int) -> list[Region]:
        """The regions of the global tensor that `rank` of `size` holds, in the order it holds them along `axis`."""
        regions, first, full = [], 0, whole(shape)
        for block in self._blocks(shape[self.axis]):
            start = first + rank * (block // size)
            regions.append((*full[: self.axis], (start, start + block // size), *full[self.axis + 1 :]))
            first += block
        return regions

    def split(self, tensor: "torch.Tensor", size: int) -> "list[torch.Tensor]":
        """The local tensors of all ranks."""
        import torch

        blocks = tensor.split(self._blocks(tensor.shape[self.axis]), self.axis)
        cut = [block.chunk(size, self.axis) for block in blocks]
        return [torch.cat([block[rank] for block in cut], self.axis) for rank in range(size)]

    def join(self, parts: "Sequence[torch.Tensor]") -> "torch.Tensor":
        """The global tensor of all ranks' local tensors."""
        import torch

        if len(parts) == 1:
            return parts[0]
        sizes = self._blocks(parts[0].shape[self.axis])
        cut = [part.split(sizes, self.axis) for part in parts]
        return torch.cat([blocks[index] for index in range(len(sizes)) for blocks in cut], self.axis)


@dataclass(frozen=True)
class NamedBlocks(Blocks):
    """Blocks that Megatron-Core's checkpoints hold under keys of their own: `NAME.z`, `NAME.x`, ...

    Args:
        names: what the keys add to the weight's name, in the order of the blocks.
    """

    names: tuple[str, ...] = ()


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
