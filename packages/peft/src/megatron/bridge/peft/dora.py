"""DoRA (arXiv:2402.09353): LoRA, and the length of each output's weights is learnt apart from their direction."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.bridge.peft.lora import LoRA

if TYPE_CHECKING:
    from megatron.bridge.peft.adapter import Adapter, Place


@dataclass(kw_only=True)
class DoRA(LoRA):
    """LoRA whose outputs are scaled to learnt lengths; settings as for `LoRA`."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.dropout_position != "pre":
            yield f"dropout_position={self.dropout_position!r} is not what DoRA does; leave it at 'pre'"
        if self.share_experts:
            yield "share_experts=True is not supported with DoRA: each expert's weight has lengths of its own"
        if self.init_lora_weights in ("pissa", "olora"):
            yield f"init_lora_weights={self.init_lora_weights!r} is not supported with DoRA; leave it at 'kaiming'"

    def adapter(self, layer: Any, place: "Place") -> "Adapter":
        from megatron.bridge.peft.weight_decomposed import WeightDecomposed, WeightDecomposedParts

        self.refuse_some_parts(place.name)
        return (WeightDecomposedParts if self.separates(place) else WeightDecomposed)(place, layer, self)

    def hf_config(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return super().hf_config(settings) | {"use_dora": True}
