"""InternVL 3 in transformers' own format (arXiv:2504.10479), over any language family of this package."""

from megatron.bridge.models.families.vision_language import VisionLanguageBridge


class InternVLBridge(VisionLanguageBridge):
    """`InternVLForConditionalGeneration`."""
