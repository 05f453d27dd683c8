"""Gemma 3 with images (arXiv:2503.19786)."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron.bridge.models.families.vision_language import VisionLanguageBridge

if TYPE_CHECKING:
    import torch

    from megatron.bridge.models.vision_half import Vision


class Gemma3VisionBridge(VisionLanguageBridge):
    """`Gemma3ForConditionalGeneration`: tokens of an image attend to each other in both directions."""

    language_architecture = "Gemma3ForCausalLM"

    def vision(self) -> "Vision":
        return dataclasses.replace(super().vision(), image_blocks=True)

    def language_fields(self) -> Mapping[str, Any]:
        return {"block_attention": True}

    def token_types(self, tokens: "torch.Tensor") -> "Mapping[str, torch.Tensor]":
        return {"token_type_ids": self.vision().token_types(tokens)}
