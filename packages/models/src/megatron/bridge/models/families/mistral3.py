"""Mistral Small 3.1 and its successors with images (2025)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron.bridge.models.families.vision_language import VisionLanguageBridge

if TYPE_CHECKING:
    import torch


class Mistral3Bridge(VisionLanguageBridge):
    """`Mistral3ForConditionalGeneration`: images of any size, whose patches are merged before they are projected."""

    def probe_images(self, count: int, generator: "torch.Generator") -> "Mapping[str, torch.Tensor]":
        import torch

        height = self.hf_config.vision_config.patch_size * self.hf_config.spatial_merge_size
        width = self.hf_config.vision_config.image_size // height * height
        channels = self.hf_config.vision_config.num_channels
        return {
            "pixel_values": torch.randn(count, channels, height, width, generator=generator),
            "image_sizes": torch.tensor([[height, width]] * count),
        }
