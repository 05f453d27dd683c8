"""Weights stored as small numbers and scales: number times scale."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.bridge.conversion.low_bit.scales import ScaleGrid
from megatron.bridge.conversion.transforms import Region, Shape

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.weight_source import FolderSource


@dataclass(frozen=True)
class ScaledWeight:
    """Floats or integers of one byte, times their scales, in float32.

    Args:
        name: of the tensor that holds the numbers.
        shape: of the weight.
        scales: see `ScaleGrid`.
        rounded: whether the product has the scales' own precision (compressed-tensors) instead of float32.
    """

    name: str
    shape: Shape
    scales: ScaleGrid
    rounded: bool = False

    def read(self, source: "FolderSource", region: Region) -> "torch.Tensor":
        """The region's values."""
        scales = self.scales.read(source, region)
        product = source.read(self.name, region).float() * as_float(scales)
        return product.to(scales.dtype) if self.rounded else product


def as_float(scales: "torch.Tensor") -> "torch.Tensor":
    """Scales in float32; bytes are powers of two, with an exponent bias of 127."""
    import torch

    if scales.dtype == torch.uint8:
        return torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - 127)
    return scales.float()
