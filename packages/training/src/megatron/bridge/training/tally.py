"""Means of numbers that a loss function tells besides the loss: rewards of preference training, for instance."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Tally:
    """Adds up numbers of samples on the ranks that see them.

    Args:
        names: of the numbers, the same on every rank.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self._sums: Tensor | None = None
        self._count = 0

    def add(self, numbers: "Mapping[str, Tensor]") -> None:
        """Count one sample: a number for each of the names."""
        import torch

        held = torch.stack([numbers[name].detach().float() for name in self.names])
        self._sums = held if self._sums is None else self._sums + held
        self._count += 1

    def means(self, prefix: str = "") -> dict[str, float]:
        """The means over all samples of all ranks since the last call, by `prefix` and name. Collective."""
        if not self.names:
            return {}
        import torch

        from megatron.bridge.platform import device

        own = [0.0] * len(self.names) if self._sums is None else self._sums.tolist()
        total = torch.tensor([*own, self._count], dtype=torch.float64, device=device())
        self._sums, self._count = None, 0
        # Ranks that share a sample all count it, which changes no mean.
        torch.distributed.all_reduce(total)
        *sums, count = total.tolist()
        return {prefix + name: value / count for name, value in zip(self.names, sums, strict=True)} if count else {}
