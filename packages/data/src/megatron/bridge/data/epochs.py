"""Endless samples of a finite dataset: every epoch in an order of its own, which the seed decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ENDLESS = 1 << 62  # more samples than any run draws


class Reshuffled(Dataset[Any]):
    """Sample `k` is one of epoch `k // len(dataset)`; each epoch holds every sample once.

    The order depends on the seed and the number of the epoch alone: not on ranks, workers or where a run was resumed.

    Args:
        dataset: map-style, not empty.
        seed: of the orders.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        if len(dataset) == 0:
            raise BridgeError("the dataset is empty: there is nothing to draw from, in any order")
        self.dataset, self.seed = dataset, seed
        self.notices = getattr(dataset, "notices", ())
        self.collate = getattr(dataset, "collate", None)
        self._epoch = -1
        self._order: NDArray[np.int64]

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Any:
        epoch, place = divmod(index, len(self.dataset))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        return self.dataset[int(self._order[place])]

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        import numpy as np

        order: NDArray[np.int64] = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(
            len(self.dataset)
        )
        return order
