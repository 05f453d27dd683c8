"""How many bytes a parameter takes: itself, its gradient, and what the optimizer keeps of it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes per parameter, and per element of an activation.

    Attributes:
        weight: of the model.
        gathered: of a weight as data-parallel ranks send it to each other.
        gradient: as it is added up over micro-batches and ranks.
        optimizer: AdamW's two moments in fp32, and a copy of the weight where that has fewer digits.
        distributed: whether the optimizer's part is divided over data-parallel ranks (arXiv:1910.02054).
    """

    weight: int = 2
    gathered: int = 2
    gradient: int = 4
    optimizer: int = 12
    distributed: bool = True

    @property
    def activation(self) -> int:
        """Of an element; matrix products in 8 bits keep their inputs in 16."""
        return self.weight


def bytes_of(dtype: str, *, gradients_in_fp32: bool = True, distributed: bool = True) -> Bytes:
    """For parameters of this type: `bfloat16`, `float16` or `float32`."""
    if dtype == "float32":
        return Bytes(weight=4, gathered=4, gradient=4, optimizer=8, distributed=distributed)
    return Bytes(gradient=4 if gradients_in_fp32 else 2, distributed=distributed)
