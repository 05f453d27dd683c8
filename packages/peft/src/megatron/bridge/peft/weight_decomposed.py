"""DoRA's adapter (arXiv:2402.09353): `m * (W + scale * B A) / |W + scale * B A| x`, with a length m for each output."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.bridge.conversion.adapters import AdapterWeight
from megatron.bridge.conversion.shards import Blocks, Replicated
from megatron.bridge.conversion.transforms import Transform
from megatron.bridge.errors import BridgeError
from megatron.bridge.peft.adapter import Forward, Place, with_output
from megatron.bridge.peft.low_rank import LowRank
from megatron.bridge.peft.low_rank_parts import LowRankParts

if TYPE_CHECKING:
    from megatron.bridge.peft.dora import DoRA

MAGNITUDE = "magnitude"


class _Decomposed(LowRank):
    """LoRA's product, and the norm of every row of the weight, which begins as it is.

    Args:
        place: of the layer.
        layer: itself.
        method: as for LoRA.
    """

    def __init__(self, place: Place, layer: Any, method: "DoRA") -> None:
        if place.division.kind in ("vocabulary", "whole"):
            raise BridgeError(
                f"DoRA is for linear layers; leave {place.name} out of target_modules, or use LoRA for it"
            )
        if layer.weight is None:
            raise BridgeError(f"{place.name} shares its weight with the embedding, whose rows DoRA cannot scale")
        super().__init__(place, layer, method)
        with torch.no_grad():
            self.add(MAGNITUDE, self.division.row_norms(self.merged_direction(layer.weight)), layer)

    def shards(self) -> Mapping[str, Blocks | Replicated]:
        return {**super().shards(), MAGNITUDE: self.division.output_shard}

    def merged_direction(self, weight: Tensor) -> Tensor:
        """This rank's part of `W + scale * B A`."""
        return super().merged(weight)

    def merged(self, weight: Tensor) -> Tensor:
        direction = self.merged_direction(weight)
        lengths = getattr(self, MAGNITUDE) / self.division.row_norms(direction)
        return direction * lengths[:, None]

    def forward(self, layer: Any, forward: Forward, values: Tensor) -> Any:
        if self.dropout > 0.0 and self.training:
            return self._with_dropout(layer, forward, values)
        result = forward(values)
        return with_output(result, lambda output, bias: (self._scaled(layer, values, output, bias), bias))

    def _scaled(self, layer: Any, values: Tensor, output: Tensor, bias: Tensor | None) -> Tensor:
        division = self.division
        inner = layer.bias if bias is None and getattr(layer, "bias", None) is not None else None
        plain = output if inner is None else output - inner
        scaled = self.added(layer, values, plain) * division.matched(self._lengths(layer), output)
        return scaled if inner is None else scaled + inner

    def _lengths(self, layer: Any) -> Tensor:
        """What each output is multiplied by; the norm counts as a constant, as section 4.3 of the paper has it."""
        with torch.no_grad():
            norms = self.division.row_norms(self.merged_direction(layer.weight))
        magnitude: Tensor = getattr(self, MAGNITUDE)
        if self.division.dispatched and self.division.kind == "row":
            magnitude = self.division.shared(magnitude)
        return magnitude / norms

    def _with_dropout(self, layer: Any, forward: Forward, values: Tensor) -> Any:
        """As peft does: what is added is made of the dropped inputs, also where it is the layer's own part."""
        if getattr(layer, "layer_norm_weight", None) is not None:
            raise BridgeError(f"{self.place.name}: DoRA with dropout does not work on a layer that holds its own norm")
        dropped = self.dropped_inputs(values)
        result, lessened = forward(values), forward(dropped)
        bias = result[1] if isinstance(result, tuple) else None
        inner = layer.bias if bias is None and getattr(layer, "bias", None) is not None else None
        lessened = lessened[0] if isinstance(lessened, tuple) else lessened
        plain = lessened if inner is None else lessened - inner
        lengths = self.division.matched(self._lengths(layer), plain)
        added = (lengths - 1) * plain + lengths * self.product(layer, dropped, plain, drop=False)
        return with_output(result, lambda output, own: (output + added, own))

    def hf_weights(self, modules: tuple[str, ...], rows: Transform) -> Iterator[AdapterWeight]:
        yield from super().hf_weights(modules, rows)
        yield AdapterWeight(MAGNITUDE, tuple(f"{module}.lora_magnitude_vector" for module in modules), rows)


class WeightDecomposed(_Decomposed):
    """With one pair of matrices for all parts of the layer."""


class WeightDecomposedParts(_Decomposed, LowRankParts):
    """With a pair of matrices for each part of the layer."""
