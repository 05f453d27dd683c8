"""A folder of weights in few bits as a source of the weights they stand for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron.bridge.conversion.transforms import Region, Shape
from megatron.bridge.conversion.weight_source import FolderSource

if TYPE_CHECKING:
    import torch

_STRIP_ROWS = 512  # rows at a time: what decoding holds besides its result


class LowBitWeight(Protocol):
    """A weight that is decoded from other tensors of the folder."""

    @property
    def shape(self) -> Shape: ...

    def read(self, source: FolderSource, region: Region) -> "torch.Tensor":
        """The region's values, before they are cast to the checkpoint's dtype."""


@dataclass(frozen=True)
class Decoding:
    """What a low-bit format makes of a folder.

    Args:
        weights: decoded weights by the name they would have in full precision.
        consumed: tensors of the folder that stand for no weight by themselves.
    """

    weights: Mapping[str, LowBitWeight]
    consumed: frozenset[str]


class LowBitSource:
    """Decodes what is asked for, and reads only the bytes it takes. A part equals that part of the whole, bit for bit.

    Args:
        folder: the files' own tensors.
        decoding: which of them are decoded, and how.
        dtype: of decoded weights; others keep their own.
    """

    def __init__(self, folder: FolderSource, decoding: Decoding, dtype: "torch.dtype") -> None:
        self._folder, self._decoded = folder, decoding.weights
        kept = [name for name in folder.shapes if name not in decoding.consumed and name not in decoding.weights]
        decoded = {name: weight.shape for name, weight in decoding.weights.items()}
        self.shapes: Mapping[str, Shape] = {name: folder.shapes[name] for name in kept} | decoded
        self.dtypes: Mapping[str, torch.dtype] = {name: folder.dtypes[name] for name in kept} | dict.fromkeys(
            decoded, dtype
        )
        self._dtype = dtype

    def read(self, name: str, region: Region) -> "torch.Tensor":
        """The region of a weight, on the CPU."""
        import torch

        weight = self._decoded.get(name)
        if weight is None:
            return self._folder.read(name, region)
        result = torch.empty([stop - start for start, stop in region], dtype=self._dtype)
        for strip in _strips(region):
            place = tuple(
                slice(low - start, high - start) for (low, high), (start, _) in zip(strip, region, strict=True)
            )
            result[place] = weight.read(self._folder, strip)
        return result


def _strips(region: Region) -> Iterator[Region]:
    """Parts of a region: one entry of its leading axes each, and some rows of it."""
    if len(region) > 2:
        (start, stop), *rest = region
        for index in range(start, stop):
            for strip in _strips(tuple(rest)):
                yield ((index, index + 1), *strip)
        return
    (start, stop), *columns = region
    for low in range(start, stop, _STRIP_ROWS):
        yield ((low, min(low + _STRIP_ROWS, stop)), *columns)
