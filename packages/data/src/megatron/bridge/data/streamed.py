"""Datasets that load themselves: no sample has a number, and where a rank stands is the loader's own state."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LoaderPlace:
    """For whom micro-batches are loaded.

    Attributes:
        micro_batch_size: sequences in each.
        dp_rank, dp_size: place among the data-parallel ranks; ranks that share one get the same micro-batches.
    """

    micro_batch_size: int
    dp_rank: int
    dp_size: int


class StreamedBatches(Iterator["dict[str, Tensor]"], ABC):
    """The micro-batches of one data-parallel rank: dicts of `tokens`, `labels`, `loss_mask`, `position_ids`."""

    @abstractmethod
    def state_dict(self) -> Any:
        """Where the stream stands after the last micro-batch that was taken from it; it is pickled into checkpoints."""

    @abstractmethod
    def load_state_dict(self, state: Any) -> None:
        """Go on from a state; only before the first micro-batch."""


class StreamedDataset(ABC):
    """A split that a `DatasetProvider` may return in the place of a map-style dataset."""

    @abstractmethod
    def batches(self, place: LoaderPlace) -> StreamedBatches:
        """The micro-batches for a place, from the beginning: the same ones each time."""
