"""`PreTrainedCausalLM`: the Hugging Face model as a family written against the established names sees it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class PreTrainedCausalLM:
    """A Hugging Face model that is being converted; its weights are read by the conversion, never through this.

    Attributes:
        config: the model's configuration.
    """

    config: "PretrainedConfig"
