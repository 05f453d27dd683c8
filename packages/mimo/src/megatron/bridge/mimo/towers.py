"""Vision towers of transformers as encoders: CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from megatron.bridge.mimo.encoders import Encoder, Inputs

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(kw_only=True)
class VisionTower(Encoder):
    """A tower by its transformers configuration; an image's features are those of its patches.

    Attributes:
        hf_config: fields of transformers' configuration; the rest has its defaults.
        feature_layer: whose hidden states are the features, as transformers counts; -1 for the last one's.
    """

    hf_config: Mapping[str, Any]
    feature_layer: int = -1
    # transformers' names, and how many tokens before those of the patches the tower has.
    names: ClassVar[tuple[str, str]]
    others: ClassVar[int] = 0

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("pixel_values",)

    @property
    def width(self) -> int:
        return int(self._config().hidden_size)

    @property
    def features_per_item(self) -> int:
        """Features of one image."""
        config = self._config()
        return int((config.image_size // config.patch_size) ** 2)

    def build(self, config: "TransformerConfig", *, initialized: bool) -> torch.nn.Module:
        import transformers

        model = getattr(transformers, self.names[1])
        tower: torch.nn.Module = model._from_config(self._config(), dtype=config.params_dtype)
        return tower

    def encode(self, module: torch.nn.Module, inputs: Inputs) -> Sequence[Tensor]:
        states = module(inputs["pixel_values"], output_hidden_states=True).hidden_states
        return list(states[self.feature_layer][:, self.others :])

    def ghost(self) -> Inputs:
        config = self._config()
        return {"pixel_values": torch.zeros(1, config.num_channels, config.image_size, config.image_size)}

    def _config(self) -> Any:
        import transformers

        return getattr(transformers, self.names[0])(**self.hf_config)


@dataclass(kw_only=True)
class ClipTower(VisionTower):
    """CLIP's; the class token is left out."""

    names: ClassVar[tuple[str, str]] = ("CLIPVisionConfig", "CLIPVisionModel")
    others: ClassVar[int] = 1


@dataclass(kw_only=True)
class SiglipTower(VisionTower):
    """SigLIP's."""

    names: ClassVar[tuple[str, str]] = ("SiglipVisionConfig", "SiglipVisionModel")
