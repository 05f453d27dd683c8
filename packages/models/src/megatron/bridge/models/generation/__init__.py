"""Text from Megatron models: token by token, greedy or sampled, at any layout."""

from megatron.bridge.models.generation.choice import Choice
from megatron.bridge.models.generation.generate import generate
from megatron.bridge.models.generation.last_logits import last_logits

__all__ = ["Choice", "generate", "last_logits"]
