"""Qwen2-VL (arXiv:2409.12191), Qwen2.5-VL (arXiv:2502.13923) and Qwen3-VL (arXiv:2511.21631)."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.vision_language import INSIDE, Layout, VisionLanguageBridge

if TYPE_CHECKING:
    import torch

    from megatron.bridge.models.vision_half import Vision


class Qwen2VLBridge(VisionLanguageBridge):
    """`Qwen2VLForConditionalGeneration` and `Qwen2_5_VLForConditionalGeneration`: images and videos of any size, whose
    tokens have positions in time, height and width.
    """

    language_architecture = "Qwen2ForCausalLM"
    layout = Layout({}, spellings=(("model.", "model.language_model."), ("visual.", "model.visual.")))
    vision_modules = ("visual",)
    interleaved: ClassVar[bool] = False

    def vision(self) -> "Vision":
        from megatron.bridge.models.vision_half import IMAGE, VIDEO, Vision

        return Vision(self.hf_config, modalities=(IMAGE, VIDEO), grid_positions=True)

    def language_fields(self) -> Mapping[str, Any]:
        sections = self.hf_config.text_config.rope_parameters.get("mrope_section")
        if sections is None:
            raise BridgeError("config.json: rope_parameters (rope_scaling) lack mrope_section")
        return {
            "position_embedding_type": "mrope",
            "mrope_section": list(sections),
            "mrope_interleaved": self.interleaved,
        }

    def token_types(self, tokens: "torch.Tensor") -> "Mapping[str, torch.Tensor]":
        return {"mm_token_type_ids": self.vision().token_types(tokens)}

    def probe_images(self, count: int, generator: "torch.Generator") -> "Mapping[str, torch.Tensor]":
        import torch

        vision = self.hf_config.vision_config
        high, wide = 2 * vision.spatial_merge_size, 3 * vision.spatial_merge_size
        channels = getattr(vision, "in_channels", 3)
        patch = channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": torch.randn(count * high * wide, patch, generator=generator),
            "image_grid_thw": torch.tensor([[1, high, wide]] * count),
        }


class Qwen3VLBridge(Qwen2VLBridge):
    """`Qwen3VLForConditionalGeneration`: features of several depths of the tower go to the first decoder layers."""

    language_architecture = "Qwen3ForCausalLM"
    layout = INSIDE
    interleaved = True

    def vision(self) -> "Vision":
        return dataclasses.replace(
            super().vision(), deepstack=len(self.hf_config.vision_config.deepstack_visual_indexes)
        )
