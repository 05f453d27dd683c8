"""Scales, each for a block of a weight's elements."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.bridge.conversion.transforms import Region, Shape
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.weight_source import FolderSource


@dataclass(frozen=True)
class ScaleGrid:
    """The scales of one weight: scale [i, j] is that of rows i * block[0] and columns j * block[1] and following.

    Args:
        name: of the tensor that holds them.
        block: elements that share a scale, per axis of the weight; the last block of an axis may be smaller.
        stored: the tensor's shape. A single scale may be stored as a scalar or as a vector of one.
    """

    name: str
    block: Shape
    stored: Shape

    @classmethod
    def over(cls, name: str, stored: Shape, weight: str, shape: Shape, block: Shape) -> "ScaleGrid":
        """The grid of the weight `weight` of `shape`.

        Raises:
            BridgeError: the stored shape is not that of the grid.
        """
        wanted = tuple(-(-size // each) for size, each in zip(shape, block, strict=True))
        single = all(size == 1 for size in stored) and all(size == 1 for size in wanted)
        if stored != wanted and not single:
            raise BridgeError(
                f"{name} {list(stored)} does not fit {weight} {list(shape)}: in blocks of {list(block)} it needs "
                f"{list(wanted)} scales; correct quantization_config in config.json, or fetch the file again"
            )
        return cls(name, block, stored)

    def read(self, source: "FolderSource", region: Region) -> "torch.Tensor":
        """The scales of a region, as stored, in a shape that broadcasts over it; only their own bytes are read."""
        if len(self.stored) != len(self.block):
            return source.read(self.name, tuple((0, size) for size in self.stored)).reshape((1,) * len(self.block))
        spans = zip(region, self.block, self.stored, strict=True)
        covering = tuple(
            (start // size, -(-stop // size)) if count > 1 else (0, 1) for (start, stop), size, count in spans
        )
        scales = source.read(self.name, covering)
        for axis, ((start, stop), size) in enumerate(zip(region, self.block, strict=True)):
            if size > 1 and self.stored[axis] > 1:
                first = start - covering[axis][0] * size
                scales = scales.repeat_interleave(size, axis).narrow(axis, first, stop - start)
        return scales
