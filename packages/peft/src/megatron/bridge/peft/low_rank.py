"""LoRA's adapter (arXiv:2106.09685): the product of two narrow matrices beside a layer's frozen one."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.bridge.conversion.adapters import AdapterWeight
from megatron.bridge.conversion.shards import Blocks, Replicated
from megatron.bridge.conversion.transforms import Transform, Transposed
from megatron.bridge.errors import BridgeError
from megatron.bridge.peft.adapter import Adapter, Forward, Place, with_output
from megatron.bridge.peft.divided_layer import layer_input
from megatron.bridge.peft.initial_values import OF_THE_WEIGHT, RANDOM, generator
from megatron.bridge.peft.whole_weight import whole_weight

if TYPE_CHECKING:
    from megatron.bridge.peft.lora import LoRA

A, B = "lora_A", "lora_B"
# What A and B were at the beginning, where their product is taken off (PiSSA, OLoRA): the model's own weight stays.
A0, B0 = "lora_A_initial", "lora_B_initial"


class LowRank(Adapter):
    """`scale * B A x`, added to what the layer gives.

    Args:
        place: of the layer.
        layer: itself.
        method: rank, scale, dropout and initial values.
    """

    def __init__(self, place: Place, layer: Any, method: "LoRA") -> None:
        super().__init__(place, method)
        self.rank = method.rank_of(place)
        self.scale = method.scale_of(place, self.rank)
        self.dropout, self.dropout_position = method.dropout, method.dropout_position
        self._begin(layer, method)

    def _begin(self, layer: Any, method: "LoRA") -> None:
        division = self.division
        kind = method.init_lora_weights
        if division.kind == "vocabulary":
            # As peft does: an embedding's A is looked up, and begins at zero.
            source = generator(method.seed, self.place.origin)
            narrowing = torch.zeros(division.inputs, self.rank)
            expanding = torch.empty(division.outputs, self.rank).normal_(generator=source)
        elif kind in RANDOM:
            source = generator(method.seed, self.place.origin)
            narrowing, expanding = RANDOM[kind](self.rank, division.inputs, division.outputs, source)
        else:
            narrowing, expanding = self._from_weight(layer, OF_THE_WEIGHT[kind])
        for name, whole in ((A, narrowing), (B, expanding)):
            part = self.shards()[name].split(whole, division.size)[division.rank]
            self.add(name, part, layer)
            if kind in OF_THE_WEIGHT and division.kind != "vocabulary":
                self.register_buffer(f"{name}_initial", getattr(self, name).detach().clone())

    def _from_weight(self, layer: Any, decompose: Any) -> tuple[Tensor, Tensor]:
        if layer.weight is None:
            raise BridgeError(f"{self.place.name} shares its weight with the embedding; name another init_lora_weights")
        weight = whole_weight(layer, self.division)
        if self.rank > min(weight.shape):
            raise BridgeError(
                f"rank {self.rank} is more than the {min(weight.shape)} directions that {self.place.name} has"
            )
        narrowing, expanding = decompose(weight, self.rank)
        return narrowing / self.scale, expanding

    def shards(self) -> Mapping[str, Blocks | Replicated]:
        narrowing, expanding = self.division.input_shard, self.division.output_shard
        return {A: narrowing, B: expanding, A0: narrowing, B0: expanding}

    @property
    def exported_rank(self) -> int:
        """The rank that peft holds."""
        return self.rank * (2 if self.is_taken_off else 1)

    @property
    def is_taken_off(self) -> bool:
        """Whether what the matrices gave at the beginning is subtracted."""
        return A0 in self._buffers

    def forward(self, layer: Any, forward: Forward, values: Tensor) -> Any:
        result = forward(values)
        return with_output(result, lambda output, bias: (self.added(layer, values, output), bias))

    def added(self, layer: Any, values: Tensor, output: Tensor) -> Tensor:
        """The layer's output and the product."""
        product = self.product(layer, values, output)
        # The product is nobody else's, and as wide as the output: adding in place saves one such tensor.
        return product.add_(output) if product.dtype == output.dtype else output + product

    def product(self, layer: Any, values: Tensor, output: Tensor, *, drop: bool = True) -> Tensor:
        """`scale * B A x` as the layer's `output` is divided, with dropout."""
        division = self.division
        if division.kind != "vocabulary":
            values = layer_input(layer, values)
            if drop and self.dropout_position == "pre":
                values = self.dropped_inputs(values)
        product = self._scaled_product(values, A, B)
        if self.is_taken_off:
            product = product - self._scaled_product(values, A0, B0)
        product = division.matched(product, output)
        if drop and self.dropout_position == "post":
            product = self.dropped_outputs(product)
        return product

    def _scaled_product(self, values: Tensor, narrowing: str, expanding: str) -> Tensor:
        # Scaling between the matrices is cheap: outputs, and their gradients, are many times wider.
        narrow = self.division.reduce(values, getattr(self, narrowing)) * self.scale
        return self.division.expand(narrow, getattr(self, expanding))

    def delta(self) -> Tensor:
        """What the adapter adds to this rank's part of the weight."""
        delta = self.division.delta(getattr(self, A), getattr(self, B))
        if self.is_taken_off:
            delta = delta - self.division.delta(getattr(self, A0), getattr(self, B0))
        return delta * self.scale

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.delta().to(weight.dtype)

    def exported(self) -> dict[str, Tensor]:
        held: dict[str, Tensor] = dict(self.named_parameters())
        if self.is_taken_off:
            # Twice the rank: what was learnt, less what it began with.
            held[A] = torch.cat([held[A], getattr(self, A0)])
            held[B] = torch.cat([held[B], -getattr(self, B0)], 1)
        return held

    def hf_settings(self, target: str) -> dict[str, Any]:
        return {"rank": self.exported_rank, "scale": self.scale}

    def hf_weights(self, modules: tuple[str, ...], rows: Transform) -> Iterator[AdapterWeight]:
        if self.division.kind == "vocabulary":
            yield AdapterWeight(A, tuple(f"{module}.lora_embedding_A" for module in modules), Transposed(rows))
            yield AdapterWeight(B, tuple(f"{module}.lora_embedding_B" for module in modules))
            return
        yield AdapterWeight(A, tuple(f"{module}.lora_A.weight" for module in modules))
        yield AdapterWeight(B, tuple(f"{module}.lora_B.weight" for module in modules), rows)
