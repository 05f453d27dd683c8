"""Idefics 3 (arXiv:2408.12637) and SmolVLM (arXiv:2504.05299)."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron.bridge.models.families.vision_language import Layout, VisionLanguageBridge

if TYPE_CHECKING:
    import torch

    from megatron.bridge.models.vision_half import Vision


class Idefics3Bridge(VisionLanguageBridge):
    """`Idefics3ForConditionalGeneration` and `SmolVLMForConditionalGeneration`."""

    layout = Layout({"model.": "model.text_model."}, "model.")
    vision_modules = ("vision_model", "connector")

    def vision(self) -> "Vision":
        return dataclasses.replace(super().vision(), language="text_model")

    def probe_images(self, count: int, generator: "torch.Generator") -> "Mapping[str, torch.Tensor]":
        # A row's images are one tensor.
        return {name: images[None] for name, images in super().probe_images(count, generator).items()}
