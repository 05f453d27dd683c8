"""Aya Vision of Cohere (arXiv:2505.08751)."""

from megatron.bridge.models.families.vision_language import VisionLanguageBridge


class AyaVisionBridge(VisionLanguageBridge):
    """`AyaVisionForConditionalGeneration`."""
