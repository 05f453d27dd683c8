"""(IA)^3 (arXiv:2205.05638): factors on what layers give, and on what an MLP's last layer takes, are learnt."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.peft.layer_method import LayerMethod
from megatron.bridge.peft.targets import matches_any

if TYPE_CHECKING:
    import torch

    from megatron.bridge.peft.adapter import Adapter, Place

_IA3_L = ".ia3_l"


@dataclass(kw_only=True)
class IA3(LayerMethod):
    """Learn a factor for each output of the target layers (for each input of those in `feedforward_modules`).

    Where `target_modules` names some of a fused layer's Hugging Face parts (`k_proj`, `v_proj`), the others keep their
    outputs. The paper scales keys, values and the MLP's last layer.

    Attributes:
        target_modules: as in `PEFT`.
        feedforward_modules: which of them have factors on their inputs.
    """

    target_modules: list[str] = field(default_factory=lambda: ["k_proj", "v_proj", "linear_fc2"])
    feedforward_modules: list[str] = field(default_factory=lambda: ["linear_fc2", "down_proj"])

    @property
    def takes_parts(self) -> bool:
        return True

    def adapter(self, layer: Any, place: "Place") -> "Adapter":
        from megatron.bridge.peft.factors import InputFactors, OutputFactors

        if place.division.kind in ("vocabulary", "whole"):
            raise BridgeError(f"IA3 is for linear layers; leave {place.name} out of target_modules")
        if matches_any(self.feedforward_modules, [place.name, *place.hf]):
            return InputFactors(place, layer, self)
        return OutputFactors(place, layer, self)

    @property
    def hf_name(self) -> str:
        return "IA3"

    def hf_config(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "feedforward_modules": sorted(module for module, own in settings.items() if own["feedforward"]),
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }


def ia3_from_hf(config: Mapping[str, Any], tensors: "Mapping[str, torch.Tensor]", adapter_name: str) -> IA3:
    """The method of a file of peft.

    Args:
        config: `adapter_config.json`.
        tensors: of the file.
        adapter_name: of the adapters.

    Raises:
        BridgeError: names each feature that cannot be represented.
    """
    from megatron.bridge.peft.lora_files import OF_TRAINING, refuse_unknown_features

    known = {"target_modules", "feedforward_modules", "init_ia3_weights", "exclude_modules", "fan_in_fan_out"}
    refuse_unknown_features(config, OF_TRAINING | known)
    modules = sorted(name.removesuffix(_IA3_L) for name in tensors if name.endswith(_IA3_L))
    if not modules:
        raise BridgeError("the adapter's file holds no (IA)^3 factors (NAME.ia3_l)")
    # Factors of inputs are rows, those of outputs columns.
    inputs = [module for module in modules if tensors[module + _IA3_L].shape[0] == 1]
    return IA3(target_modules=modules, feedforward_modules=inputs, adapter_name=adapter_name)
