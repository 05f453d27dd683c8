"""LoRA's adapters on the parts of a fused layer, each with matrices of its own."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.bridge.conversion.adapters import AdapterWeight
from megatron.bridge.conversion.shards import Blocks, Replicated
from megatron.bridge.conversion.transforms import Transform
from megatron.bridge.errors import BridgeError
from megatron.bridge.peft.adapter import Place
from megatron.bridge.peft.divided_layer import layer_input
from megatron.bridge.peft.fused_rows import FusedRows
from megatron.bridge.peft.initial_values import RANDOM, generator
from megatron.bridge.peft.low_rank import LowRank

if TYPE_CHECKING:
    from megatron.bridge.peft.lora import LoRA


class LowRankParts(LowRank):
    """`scale * B_i A_i x` for each named part i; the outputs of the others stay.

    Args:
        place: of the layer.
        layer: itself.
        method: rank, scale, dropout and initial values.
    """

    def __init__(self, place: Place, layer: Any, method: "LoRA") -> None:
        assert place.rows is not None  # a layer whose parts are known has a rule
        named = method.hf_targets(place.name)
        self._named = {module: module.rpartition(".")[2] for module in place.hf if module in named}
        # Each part has its own rank and scale, as the patterns say.
        places = {leaf: dataclasses.replace(place, hf=(module,)) for module, leaf in self._named.items()}
        self._ranks = {leaf: method.rank_of(part) for leaf, part in places.items()}
        self._scales = {leaf: method.scale_of(part, self._ranks[leaf]) for leaf, part in places.items()}
        self._fused = FusedRows(place.name, place.rows, place.division)
        super().__init__(place, layer, method)
        self.scale = 1.0

    def _begin(self, layer: Any, method: "LoRA") -> None:
        division = self.division
        for module, leaf in self._named.items():
            source = generator(method.seed, f"{self.place.origin}.{leaf}")
            local = self._fused.sizes[self.place.hf.index(module)]
            outputs = local * (division.size if division.kind == "column" else 1)
            narrowing, expanding = RANDOM[method.init_lora_weights](self._ranks[leaf], division.inputs, outputs, source)
            for matrix, whole in (("lora_A", narrowing), ("lora_B", expanding)):
                name = f"{leaf}_{matrix}"
                self.add(name, self.shards()[name].split(whole, division.size)[division.rank], layer)

    def shards(self) -> Mapping[str, Blocks | Replicated]:
        expanding = Blocks(0) if self.division.kind == "column" else self.division.output_shard
        shards: dict[str, Blocks | Replicated] = {}
        for leaf in self._named.values():
            shards |= {f"{leaf}_lora_A": self.division.input_shard, f"{leaf}_lora_B": expanding}
        return shards

    def _pairs(self) -> "list[tuple[Tensor, Tensor] | None]":
        """A and B of each part of the layer, in order, A with the part's scale; None for one without."""
        return [None if leaf is None else self._pair(leaf) for leaf in map(self._named.get, self.place.hf)]

    def _pair(self, leaf: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"{leaf}_lora_A") * self._scales[leaf], getattr(self, f"{leaf}_lora_B")

    def product(self, layer: Any, values: Tensor, output: Tensor, *, drop: bool = True) -> Tensor:
        division = self.division
        values = layer_input(layer, values)
        if drop and self.dropout_position == "pre":
            values = self.dropped_inputs(values)
        pairs = self._pairs()
        # One product for all parts' A: one exchange between ranks instead of one for each.
        held = [pair for pair in pairs if pair is not None]
        narrow = iter(
            division.reduce(values, torch.cat([pair[0] for pair in held])).split(list(self._ranks.values()), -1)
        )
        parts = [None if pair is None else division.expand(next(narrow), pair[1]) for pair in pairs]
        product = division.matched(self._fused.fuse(parts, output.new_zeros(1)), output)
        if drop and self.dropout_position == "post":
            product = self.dropped_outputs(product)
        return product

    def delta(self) -> Tensor:
        parts = [None if pair is None else self.division.delta(*pair).t() for pair in self._pairs()]
        first = next(part for part in parts if part is not None)
        return self._fused.fuse(parts, first.new_zeros(1)).t()

    def hf_settings(self, target: str) -> dict[str, Any]:
        leaf = target.rpartition(".")[2]
        return {"rank": self._ranks[leaf], "scale": self._scales[leaf]}

    def hf_targets(self, targets: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(each for each in targets if each.rpartition(".")[2] in self._named.values())

    def hf_weights(self, modules: tuple[str, ...], rows: Transform) -> Iterator[AdapterWeight]:
        if len(modules) != len(self.place.hf):
            raise BridgeError(
                f"peft has one adapter for all that {self.place.name} holds, because transformers stacks the experts; "
                "use LoRA on these layers"
            )
        for module in modules:
            leaf = module.rpartition(".")[2]
            if leaf in self._named.values():
                yield AdapterWeight(f"{leaf}_lora_A", (f"{module}.lora_A.weight",))
                yield AdapterWeight(f"{leaf}_lora_B", (f"{module}.lora_B.weight",))
