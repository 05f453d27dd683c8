"""What VeRA puts on one layer: its vectors, and views of the matrices that it shares with the others."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.bridge.conversion.adapters import AdapterWeight
from megatron.bridge.conversion.shards import REPLICATED, Blocks, Replicated
from megatron.bridge.conversion.transforms import Transform
from megatron.bridge.peft.adapter import Adapter, Forward, Place, with_output
from megatron.bridge.peft.divided_layer import layer_input
from megatron.bridge.peft.fused_rows import FusedRows

if TYPE_CHECKING:
    from vera_bridge.method import VeRA

D, B = "vera_lambda_d", "vera_lambda_b"


class Vectors(Adapter):
    """`b * B (d * A x)` for each part of a layer, added to what it gives.

    Args:
        place: of the layer; where its Hugging Face parts are not known, it is one part.
        layer: itself.
        method: the settings.

    Attributes:
        sizes: inputs of the layer, and outputs of its largest part, over all ranks.
    """

    narrowing: Tensor

    def __init__(self, place: Place, layer: Any, method: "VeRA") -> None:
        super().__init__(place, method)
        self.dropout = method.dropout
        named = method.hf_targets(place.name)
        # The parts in their order in the layer; None for one that keeps its outputs.
        self._parts = [module.rpartition(".")[2] if module in named else None for module in place.hf] or [""]
        self._fused = None if place.rows is None else FusedRows(place.name, place.rows, self.division)
        ranks = self.division.size if self.division.kind == "column" else 1
        outputs = [self.division.outputs // ranks] if self._fused is None else self._fused.sizes
        self._outputs = dict(zip(self._parts, outputs, strict=True))
        self.sizes = (self.division.inputs, ranks * max(self._outputs[part] for part in self._own))
        for part in self._own:
            self.add(_name(part, D), torch.full((method.dim,), method.d_initial), layer)
            self.add(_name(part, B), torch.zeros(self._outputs[part]), layer)

    @property
    def _own(self) -> list[str]:
        """The parts that have vectors."""
        return [part for part in self._parts if part is not None]

    def take(self, narrowing: Tensor, expanding: Tensor) -> None:
        """Keep this rank's part of A [dim, inputs] and B [outputs, dim], which may be those of larger layers."""
        division = self.division
        inputs = narrowing[:, : division.inputs]
        # A checkpoint holds vectors alone.
        part_of_rank = division.input_shard.split(inputs, division.size)[division.rank]
        self.register_buffer("narrowing", part_of_rank, persistent=False)
        ranks = division.size if division.kind == "column" else 1
        for part in self._own:
            outputs = expanding[: self._outputs[part] * ranks]
            shard = self._output_shard
            self.register_buffer(_matrix(part), shard.split(outputs, division.size)[division.rank], persistent=False)

    @property
    def _output_shard(self) -> Blocks | Replicated:
        """Parts are divided each by itself."""
        return self.division.output_shard if self._fused is None or self.division.kind == "row" else Blocks(0)

    def shards(self) -> Mapping[str, Blocks | Replicated]:
        found: dict[str, Blocks | Replicated] = {}
        for part in self._own:
            found |= {_name(part, D): REPLICATED, _name(part, B): self._output_shard}
        return found

    def forward(self, layer: Any, forward: Forward, values: Tensor) -> Any:
        result = forward(values)
        return with_output(result, lambda output, bias: (output + self._product(layer, values, output), bias))

    def _product(self, layer: Any, values: Tensor, output: Tensor) -> Tensor:
        narrow = self.division.reduce(self.dropped_inputs(layer_input(layer, values)), self.narrowing)
        parts = [None if part is None else self._expanded(part, narrow) for part in self._parts]
        return self.division.matched(self._joined(parts), output)

    def _expanded(self, part: str, narrow: Tensor) -> Tensor:
        scale = getattr(self, _name(part, D))
        if self.division.kind == "column" and not self.division.sums_gradients:
            # Each rank has a part of the outputs, and with it a part of the gradient.
            scale = self.division.shared(scale)
        return self.division.expand(narrow * scale, getattr(self, _matrix(part))) * getattr(self, _name(part, B))

    def _joined(self, parts: "list[Tensor | None]") -> Tensor:
        """The parts' last axes as the layer's outputs lie; zeros for parts without vectors."""
        first = next(part for part in parts if part is not None)
        return first if self._fused is None else self._fused.fuse(parts, first.new_zeros(1))

    def merged(self, weight: Tensor) -> Tensor:
        delta = self._joined([None if part is None else self._delta(part).t() for part in self._parts]).t()
        return weight + delta.to(weight.dtype)

    def _delta(self, part: str) -> Tensor:
        scaled = getattr(self, _name(part, D))[:, None] * self.narrowing
        return (getattr(self, _name(part, B))[:, None] * getattr(self, _matrix(part))) @ scaled

    def hf_targets(self, targets: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(each for each in targets if each.rpartition(".")[2] in self._own)

    def hf_weights(self, modules: tuple[str, ...], rows: Transform) -> Iterator[AdapterWeight]:
        for module in self.hf_targets(modules):
            for vector in (D, B):
                yield AdapterWeight(_name(module.rpartition(".")[2], vector), (f"{module}.{vector}",))


def _name(part: str, vector: str) -> str:
    return f"{part}_{vector}" if part else vector


def _matrix(part: str) -> str:
    return f"{part}_expanding"
