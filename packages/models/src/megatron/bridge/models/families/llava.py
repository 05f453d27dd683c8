"""LLaVA 1.5 (arXiv:2310.03744), LLaVA-NeXT (2024), LLaVA-OneVision (arXiv:2408.03326) and ViP-LLaVA (arXiv:2312.00784),
over any language family of this package.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron.bridge.models.families.vision_language import VisionLanguageBridge

if TYPE_CHECKING:
    import torch


class LlavaBridge(VisionLanguageBridge):
    """`LlavaForConditionalGeneration` and `VipLlavaForConditionalGeneration`."""


class LlavaNextBridge(VisionLanguageBridge):
    """`LlavaNextForConditionalGeneration`: an image is a small copy and tiles, whose rows end in a trained newline."""

    vision_weights = ("image_newline",)

    def probe_images(self, count: int, generator: "torch.Generator") -> "Mapping[str, torch.Tensor]":
        import torch
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        channels, height, width = self.image_shape()
        # Nearly twice as wide as high: cut to several tiles, some of whose edge is padding.
        size = (height, 2 * width - width // 4)
        tiles = image_size_to_num_patches(size, self.hf_config.image_grid_pinpoints, height)
        sizes = torch.tensor([size] * count)
        pixels = torch.randn(count, tiles, channels, height, width, generator=generator)
        return {"pixel_values": pixels, "image_sizes": sizes}


class LlavaOnevisionBridge(LlavaNextBridge):
    """`LlavaOnevisionForConditionalGeneration`: images; videos are not offered."""
