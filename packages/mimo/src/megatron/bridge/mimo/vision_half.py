"""The encoder of a Hugging Face vision-language model: its tower and projector, as transformers wrote them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.encoders import Encoder, Inputs
from megatron.bridge.models.vision_half import Vision, build_tower, features

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron.bridge.conversion.auto_bridge import AutoBridge

# In the names of the modules that transformers' models have between tower and language model.
_PROJECTORS = ("projector", "connector")
# What images do to the language model besides giving it features, by the fields of `Vision`.
_TIED = {
    "deepstack": "features that are added between layers",
    "image_blocks": "attention that images decide",
    "grid_positions": "positions that images decide",
}


@dataclass(kw_only=True)
class VisionHalf(Encoder):
    """Tower and projector of a model of `AutoBridge`; the features have the language model's width.

    Attributes:
        vision: what `megatron.bridge.models` knows of them.
        probe: inputs of one image.
    """

    vision: Vision = field(repr=False)
    probe: Mapping[str, Tensor] = field(repr=False)

    @classmethod
    def of(cls, bridge: "AutoBridge") -> "VisionHalf":
        """The vision half of a bridge's model.

        Raises:
            BridgeError: the model has none, or one that gives the language model more than features at its first layer.
        """
        family: Any = bridge.model_bridge
        architecture = bridge.hf_config.architectures[0]
        if not hasattr(family, "vision"):
            raise BridgeError(f"{architecture} has no vision half; give MimoProvider an encoder of its own")
        vision: Vision = family.vision()
        for what in (text for name, text in _TIED.items() if getattr(vision, name)):
            raise BridgeError(
                f"{architecture} has {what}, which modules of their own layouts cannot hand over; train it as one "
                "model (AutoBridge.to_megatron_provider)"
            )
        probe = family.probe_images(1, torch.Generator().manual_seed(0))
        return cls(token_id=vision.token_id(vision.modalities[0]), vision=vision, probe=probe)

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(self.vision.input_names(self.vision.modalities[0]))

    @property
    def width(self) -> int:
        return int(self.vision.hf_config.get_text_config().hidden_size)

    @property
    def projects(self) -> bool:
        return True

    def build(self, config: "TransformerConfig", *, initialized: bool) -> torch.nn.Module:
        module: torch.nn.Module = build_tower(self.vision, config.params_dtype, initialized=initialized)
        return module

    def encode(self, module: torch.nn.Module, inputs: Inputs) -> Sequence[Tensor]:
        (found,) = features(module, self.vision, inputs)
        return found.images

    def freeze(self, module: torch.nn.Module) -> None:
        for name, part in module.named_children():
            part.requires_grad_(any(each in name for each in _PROJECTORS))

    def ghost(self) -> Inputs:
        return self.probe
