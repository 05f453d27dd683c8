"""GLM-4.1V (arXiv:2507.01006)."""

import dataclasses
from typing import TYPE_CHECKING

from megatron.bridge.models.families.qwen_vl import Qwen2VLBridge
from megatron.bridge.models.families.vision_language import INSIDE

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from megatron.bridge.models.vision_half import Vision


class Glm4vBridge(Qwen2VLBridge):
    """`Glm4vForConditionalGeneration`: images of any size; videos are not offered."""

    language_architecture = "Glm4ForCausalLM"
    layout = INSIDE

    def text_config(self) -> "PretrainedConfig":
        text = super().text_config()
        text.attention_bias = True  # not stated, since it is never otherwise
        return text

    def vision(self) -> "Vision":
        from megatron.bridge.models.vision_half import IMAGE

        return dataclasses.replace(super().vision(), modalities=(IMAGE,))
