"""A Hugging Face folder as a source of weights for the live executor."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.hf import HFWeights

from megatron.bridge.conversion.transforms import Region, Shape, whole


class FolderSource:
    """Weights of an opened folder; each read touches only the bytes of its region."""

    def __init__(self, weights: "HFWeights") -> None:
        self._weights = weights
        self.shapes: Mapping[str, Shape] = {name: info.shape for name, info in weights.items()}

    def read(self, name: str, region: Region) -> "torch.Tensor":
        """The region of a weight, on the CPU."""
        if region == whole(self.shapes[name]):
            return self._weights.read(name)
        return self._weights.read(name, tuple(slice(start, stop) for start, stop in region))
