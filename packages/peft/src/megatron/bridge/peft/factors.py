"""(IA)^3's adapters (arXiv:2205.05638): a factor for each output, or for each input, of a layer."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.bridge.conversion.adapters import AdapterWeight
from megatron.bridge.conversion.shards import Blocks, Replicated
from megatron.bridge.conversion.transforms import Transform
from megatron.bridge.errors import BridgeError
from megatron.bridge.peft.adapter import Adapter, Forward, Place, with_output
from megatron.bridge.peft.fused_rows import FusedRows

FACTORS = "ia3_l"


class OutputFactors(Adapter):
    """Outputs, bias included, times learnt factors [outputs, 1], which begin at one.

    Args:
        place: of the layer.
        layer: itself.
        method: its settings.
    """

    def __init__(self, place: Place, layer: Any, method: Any) -> None:
        super().__init__(place, method)
        named = method.hf_targets(place.name)
        # The parts of a fused layer that have factors: module -> parameter; without parts, one parameter for all.
        self._parts = {module: f"{module.rpartition('.')[2]}_{FACTORS}" for module in place.hf if module in named}
        self._fused = None
        if len(place.hf) > 1 and place.rows is not None:
            self._fused = FusedRows(place.name, place.rows, self.division)
            sizes = dict(zip(place.hf, self._fused.sizes, strict=True))
            for module, name in self._parts.items():
                self.add(name, torch.ones(sizes[module], 1), layer)
        else:
            size = self.division.outputs // (self.division.size if self.division.kind == "column" else 1)
            self.add(FACTORS, torch.ones(size, 1), layer)

    def shards(self) -> Mapping[str, Blocks | Replicated]:
        if self._fused is None:
            return {FACTORS: self.division.output_shard}
        part = Blocks(0) if self.division.kind == "column" else self.division.output_shard
        return dict.fromkeys(self._parts.values(), part)

    def _factors(self) -> Tensor:
        """A factor for each output that this rank has."""
        if self._fused is None:
            factors: Tensor = getattr(self, FACTORS)
            factors = factors.flatten()
        else:
            parts = [
                getattr(self, self._parts[each]).flatten() if each in self._parts else None for each in self.place.hf
            ]
            factors = self._fused.fuse(parts, next(part for part in parts if part is not None).new_ones(1))
        if self.division.dispatched and self.division.kind == "row":
            factors = self.division.shared(factors)
        return factors

    def forward(self, layer: Any, forward: Forward, values: Tensor) -> Any:
        factors = self._factors()

        def scaled(output: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return output * self.division.matched(factors, output), None if bias is None else bias * factors

        return with_output(forward(values), scaled)

    def merged(self, weight: Tensor) -> Tensor:
        return weight * self._factors()[:, None]

    def merged_bias(self, bias: Tensor) -> Tensor:
        return bias * self._factors()

    def hf_settings(self, target: str) -> dict[str, Any]:
        return {"feedforward": False}

    def hf_weights(self, modules: tuple[str, ...], rows: Transform) -> Iterator[AdapterWeight]:
        if self._fused is None:
            yield AdapterWeight(FACTORS, tuple(f"{module}.ia3_l" for module in modules), rows)
        for module in modules if self._fused is not None else ():
            name = f"{module.rpartition('.')[2]}_{FACTORS}"
            if name in self._parts.values():
                yield AdapterWeight(name, (f"{module}.ia3_l",))

    def hf_targets(self, targets: tuple[str, ...]) -> tuple[str, ...]:
        leaves = {module.rpartition(".")[2] for module in self._parts}
        return targets if self._fused is None else tuple(each for each in targets if each.rpartition(".")[2] in leaves)


class InputFactors(Adapter):
    """Inputs times learnt factors [1, inputs], which begin at one.

    Args:
        place: of the layer.
        layer: itself.
        method: its settings.
    """

    def __init__(self, place: Place, layer: Any, method: Any) -> None:
        super().__init__(place, method)
        size = self.division.inputs // (self.division.size if self.division.kind == "row" else 1)
        self.add(FACTORS, torch.ones(1, size), layer)

    def shards(self) -> Mapping[str, Blocks | Replicated]:
        return {FACTORS: self.division.input_shard}

    def forward(self, layer: Any, forward: Forward, values: Tensor) -> Any:
        if getattr(layer, "layer_norm_weight", None) is not None:
            raise BridgeError(f"{self.place.name} begins with a norm of its own; name it in no feedforward_modules")
        factors: Tensor = getattr(self, FACTORS)
        if self.division.dispatched and self.division.kind == "column":
            factors = self.division.shared(factors)
        return forward(values * factors.flatten())

    def merged(self, weight: Tensor) -> Tensor:
        return weight * getattr(self, FACTORS)

    def hf_settings(self, target: str) -> dict[str, Any]:
        return {"feedforward": True}

    def hf_weights(self, modules: tuple[str, ...], rows: Transform) -> Iterator[AdapterWeight]:
        yield AdapterWeight(FACTORS, tuple(f"{module}.ia3_l" for module in modules))
