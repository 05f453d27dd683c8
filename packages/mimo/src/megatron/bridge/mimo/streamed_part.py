"""A stream's micro-batches on ranks whose modules take different parts of them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron.bridge.data.streamed import StreamedBatches
from megatron.bridge.mimo.slices import batch_part

if TYPE_CHECKING:
    from megatron.bridge.mimo.encoders import Encoder


class StreamedPart(StreamedBatches):
    """Part `rank` of `size` of each micro-batch; the state is that of the whole stream.

    A stream divides its samples among as many as read it, and cannot be read in other parts. So ranks read what all
    modules can divide, and each keeps its own.

    Args:
        whole: the micro-batches that are read.
        encoders: by name of the modality.
        rank, size: which part.
    """

    def __init__(self, whole: StreamedBatches, encoders: "Mapping[str, Encoder]", rank: int, size: int) -> None:
        self._whole, self._encoders, self._rank, self._size = whole, encoders, rank, size

    def __next__(self) -> dict[str, Any]:
        return batch_part(next(self._whole), self._encoders, self._rank, self._size)

    def state_dict(self) -> Any:
        """The whole stream's."""
        return self._whole.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """See `StreamedBatches`."""
        self._whole.load_state_dict(state)
