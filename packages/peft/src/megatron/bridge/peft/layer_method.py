"""`LayerMethod`: a method that puts an adapter on each target layer, in place."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.peft.base import PEFT

if TYPE_CHECKING:
    import torch

    from megatron.bridge.peft.adapter import Adapter, Place


@dataclass(kw_only=True)
class LayerMethod(PEFT):
    """Define `adapter`; what else a method of this kind needs is here.

    Attributes:
        adapter_name: a model may hold several adapters; the one applied last takes part.
    """

    adapter_name: str = "default"

    @property
    def takes_parts(self) -> bool:
        """Whether a fused layer may be a target by some of its parts alone (q and v, without k)."""
        return False

    @abstractmethod
    def adapter(self, layer: Any, place: "Place") -> "Adapter":
        """A new adapter for `layer`.

        Raises:
            BridgeError: this method cannot serve the layer.
        """

    def transform(self, module: "torch.nn.Module", name: str, prefix: str) -> "torch.nn.Module":
        if not self.is_target(name, prefix):
            return module
        from megatron.bridge.peft.adapted_layer import attach
        from megatron.bridge.peft.adapter import Place
        from megatron.bridge.peft.divided_layer import Division

        full = f"{prefix}.{name}" if prefix else name
        division = Division.of(module)
        if division is None:
            return module
        if division.kind == "whole" and not self.names_router(full):
            return module
        if not self.takes_parts:
            self.refuse_some_parts(full)
        place = Place(full, division, self.hf_names(full), self.hf_rows(full))
        return attach(module, self.adapter_name, self.adapter(module, place))

    def applied(self, chunks: "list[torch.nn.Module]") -> None:
        """Let no other adapter take part, on layers either that this one is not on."""
        from megatron.bridge.peft.adapted_layer import adapted_layers

        for layer in adapted_layers(chunks):
            layer.active = self.adapter_name if self.adapter_name in layer.adapters else None

    def names_router(self, full: str) -> bool:
        """Whether a router is asked for by name, not merely matched by a pattern."""
        return any(target.rpartition(".")[2] in ("router", "gate") for target in self.target_modules)

    def refuse_some_parts(self, full: str) -> None:
        """Refuse a fused layer of which the targets name some parts only."""
        held, named = self.hf_names(full), self.hf_targets(full)
        if set(named) != set(held):
            absent = sorted({name.rpartition(".")[2] for name in set(held) - set(named)})
            raise BridgeError(
                f"{type(self).__name__}: {full} holds {', '.join(name.rpartition('.')[2] for name in held)} in one "
                f"matrix, and target_modules names only some of them; name {', '.join(absent)} too, or use "
                "CanonicalLoRA, which has an adapter for each"
            )

    @property
    def requirement(self) -> str:
        return (
            f"{type(self).__name__} changes linear layers, embeddings and output layers, and routers when they are "
            "named; Hugging Face names (q_proj) are known where the model comes from an AutoBridge"
        )

    @property
    @abstractmethod
    def hf_name(self) -> str:
        """`peft_type` in peft's `adapter_config.json`."""

    @abstractmethod
    def hf_config(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What peft's configuration says besides the kind and the targets.

        Args:
            settings: peft's name of a target -> what the adapter on it tells by `hf_settings`.
        """
