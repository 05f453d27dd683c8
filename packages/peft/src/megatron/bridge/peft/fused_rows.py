"""Which outputs of a fused layer belong to which of its Hugging Face parts, on this rank.

The weight table's own row function says it: it is asked where numbered rows go.
"""

import torch
from torch import Tensor

from megatron.bridge.conversion.transforms import InMemory, Transform, whole
from megatron.bridge.errors import BridgeError
from megatron.bridge.peft.divided_layer import Division


class FusedRows:
    """The parts of a fused layer.

    Args:
        name: of the layer, for messages.
        rows: the transform between the parts' rows and the layer's.
        division: of the layer.

    Raises:
        BridgeError: the ranks do not hold equal runs of every part (fewer key/value heads than ranks).
    """

    def __init__(self, name: str, rows: Transform, division: Division) -> None:
        counts = [shape[0] for shape in rows.hf_shapes((division.outputs,))]
        starts = [sum(counts[:part]) for part in range(len(counts))]
        numbered = [InMemory(torch.arange(start, start + count)) for start, count in zip(starts, counts, strict=True)]
        places = rows.forward(numbered, whole((division.outputs,)))
        held = division.output_shard.split(places, division.size)[division.rank]
        # Rows of each part on this rank.
        self.sizes = [count // division.size if division.kind == "column" else count for count in counts]
        firsts = [
            start + division.rank * size if division.kind == "column" else start
            for start, size in zip(starts, self.sizes, strict=True)
        ]
        expected = [torch.arange(first, first + size) for first, size in zip(firsts, self.sizes, strict=True)]
        joined = torch.cat(expected)
        if not torch.equal(held.sort().values, joined):
            raise BridgeError(
                f"the parts of {name} cannot have adapters of their own at this layout: {division.size} tensor-parallel"
                f" ranks do not hold equal runs of {counts} rows; use fewer ranks, or one adapter for all parts (LoRA)"
            )
        self._order = torch.searchsorted(joined, held)

    def fuse(self, parts: "list[Tensor | None]", fill: Tensor) -> Tensor:
        """The parts' last axes as the layer's outputs lie.

        Args:
            parts: [..., rows of the part]; None for one that is to be constant.
            fill: the constant, of any shape that expands to [..., rows].
        """
        shape = next(part.shape[:-1] for part in parts if part is not None)
        whole_parts = [
            fill.expand(*shape, size) if part is None else part for part, size in zip(parts, self.sizes, strict=True)
        ]
        return torch.cat(whole_parts, -1).index_select(-1, self._order.to(fill.device))
