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


# The attribute of a chunk whose linear layers of torch may be targets. Elsewhere they are left alone: beside a language
# model the names of a tower's layers (`q_proj`) stand for those of the language model.
TOWER = "is_tower"


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

    @property
    def serves_plain_layers(self) -> bool:
        """Whether layers of torch may be targets, in towers that transformers wrote."""
        return False

    @property
    def shares_experts(self) -> bool:
        """Whether all experts of a layer have one adapter together."""
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
        from megatron.bridge.peft.divided_layer import Division, refuse_apart

        full = f"{prefix}.{name}" if prefix else name
        division = Division.of(module)
        if division is None:
            return module
        if division.kind == "whole" and not self.names_router(full):
            return module
        if division.kind == "plain" and not self._in_tower:
            return module
        if division.kind == "column" and division.size > 1 and name == "in_proj":
            raise BridgeError(
                f"{full} (state space, linear attention) holds several blocks, of each of which a tensor-parallel rank "
                "has a cut, and adapters are not divided so; set model.tensor_model_parallel_size=1, or leave it out: "
                "exclude_modules=['in_proj']"
            )
        if not self.takes_parts:
            self.refuse_some_parts(full)
        shared = division.expert and self.shares_experts
        place = Place(full, division, self.hf_names(full), self.hf_rows(full), shared)
        adapter = self.adapter(module, place)
        if shared:
            refuse_apart(division, full)
            first = self._of_first_expert.setdefault(place.origin, adapter)
            if first is not adapter:
                adapter.borrow(first)
        return attach(module, self.adapter_name, adapter)

    def begins(self, chunk: "torch.nn.Module") -> None:
        """Forget the experts of other models, and see whether this one is a tower of layers of torch.

        Raises:
            BridgeError: it is, and the method has no adapters for these.
        """
        self._of_first_expert: dict[str, Adapter] = {}
        self._in_tower = bool(getattr(chunk, TOWER, False))
        if self._in_tower and not self.serves_plain_layers:
            raise BridgeError(f"{type(self).__name__} has no adapters for the layers of towers; use LoRA or DoRA there")

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
            "named; Hugging Face names (q_proj) are known where the model comes from an AutoBridge. Towers have "
            "adapters in models of several modules, by MimoProvider.adapters"
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
