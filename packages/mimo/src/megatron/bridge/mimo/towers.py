"""Towers of transformers: CLIP (arXiv:2103.00020), SigLIP (arXiv:2303.15343) and Whisper's (arXiv:2212.04356)."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from megatron.bridge.mimo.encoders import Encoder, Inputs
from megatron.bridge.mimo.vit_settings import MEGATRON, TRANSFORMERS, implementation_problems, vit_problems

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(kw_only=True)
class Tower(Encoder):
    """A tower by its transformers configuration.

    Attributes:
        hf_config: fields of transformers' configuration; the rest has its defaults.
    """

    hf_config: Mapping[str, Any]
    # transformers' names of the configuration and of the model.
    names: ClassVar[tuple[str, str]]

    def build(self, config: "TransformerConfig", *, initialized: bool) -> torch.nn.Module:
        module, _, name = self.names[1].rpartition(".")
        model = getattr(importlib.import_module(f"transformers{module}"), name)
        tower: torch.nn.Module = model._from_config(self._config(), dtype=config.params_dtype)
        return tower

    def _config(self) -> Any:
        import transformers

        return getattr(transformers, self.names[0])(**self.hf_config)


@dataclass(kw_only=True)
class VisionTower(Tower):
    """A tower that sees; an image's features are those of its patches.

    Attributes:
        feature_layer: whose hidden states are the features, as transformers counts; -1 for the last one's.
        implementation: `transformers`, whole on each tensor-parallel rank; or `megatron`, Megatron-Core's ViT, which
            they divide. It begins with the same weights, and has checkpoints of its own.
    """

    feature_layer: int = -1
    implementation: str = TRANSFORMERS
    # How many tokens before those of the patches the tower has.
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

    def problems(self, tensor_parallel: int) -> Iterator[str]:
        yield from implementation_problems(self.implementation)
        if self.implementation == MEGATRON:
            yield from vit_problems(self._config(), self.feature_layer, tensor_parallel)

    def build_on(
        self, config: "TransformerConfig", groups: "ProcessGroupCollection", *, initialized: bool
    ) -> torch.nn.Module:
        if self.implementation == TRANSFORMERS:
            return super().build_on(config, groups, initialized=initialized)
        from megatron.bridge.mimo.vit import build_vit

        return build_vit(self._config(), self.feature_layer, config, groups, initialized=initialized)

    def encode(self, module: torch.nn.Module, inputs: Inputs) -> Sequence[Tensor]:
        states = module(inputs["pixel_values"], output_hidden_states=True).hidden_states
        return list(states[self.feature_layer][:, self.others :])

    def ghost(self) -> Inputs:
        config = self._config()
        return {"pixel_values": torch.zeros(1, config.num_channels, config.image_size, config.image_size)}


@dataclass(kw_only=True)
class ClipTower(VisionTower):
    """CLIP's; the class token is left out."""

    names: ClassVar[tuple[str, str]] = ("CLIPVisionConfig", "CLIPVisionModel")
    others: ClassVar[int] = 1


@dataclass(kw_only=True)
class SiglipTower(VisionTower):
    """SigLIP's."""

    names: ClassVar[tuple[str, str]] = ("SiglipVisionConfig", "SiglipVisionModel")


@dataclass(kw_only=True)
class WhisperTower(Tower):
    """Whisper's encoder. An item is a log-mel spectrogram [bins, frames], padded as Whisper's feature extractor does.

    Half as many features come out as frames go in; a `Resampler` makes them fewer.
    """

    names: ClassVar[tuple[str, str]] = ("WhisperConfig", ".models.whisper.modeling_whisper.WhisperEncoder")

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("input_features",)

    @property
    def width(self) -> int:
        return int(self._config().d_model)

    @property
    def features_per_item(self) -> int:
        """Features of one spectrogram."""
        return int(self._config().max_source_positions)

    def encode(self, module: torch.nn.Module, inputs: Inputs) -> Sequence[Tensor]:
        return list(module(inputs["input_features"]).last_hidden_state)

    def ghost(self) -> Inputs:
        config = self._config()
        return {"input_features": torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)}
