"""Vision-language models: a language family of this package behind transformers' own tower and projector."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.conversion.model_bridge import MODEL_BRIDGES, MegatronModelBridge
from megatron.bridge.conversion.table import WeightRule, WeightTable
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig
    from transformers import PretrainedConfig

    from megatron.bridge.conversion.transforms import Shape
    from megatron.bridge.models.vision_half import Vision
    from megatron.bridge.models.vision_language_provider import VisionLanguageProvider


@dataclass(frozen=True)
class Layout:
    """How files name the parts of a model.

    Args:
        language: what names of the language model by itself begin with -> in the whole model.
        vision: what names of tower and projector begin with.
        spellings: other beginnings that some versions of transformers write; see `WeightTable`.
    """

    language: Mapping[str, str]
    vision: str = ""
    spellings: tuple[tuple[str, str], ...] = ()


_VISION = "vision."
_INNER = ("vision_tower.", "multi_modal_projector.", "image_newline")
# Files of Llava's relatives, those that transformers 5 writes today among them.
BESIDE = Layout(
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    spellings=(
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        *((name, f"model.{name}") for name in _INNER),
        # transformers before version 5
        ("vision_tower.", "vision_tower.vision_model."),
        ("model.vision_tower.", "model.vision_tower.vision_model."),
    ),
)
# The names inside transformers' models.
INSIDE = Layout({"model.": "model.language_model."}, "model.")


class VisionLanguageBridge(MegatronModelBridge):
    """Llava's layout; subclasses say where their family differs.

    The language model is that of `text_config`: the family that transformers' causal model of its type belongs to, or
    `language_architecture`.
    """

    language_prefix = "language_model."
    language_architecture: ClassVar[str | None] = None
    layout: ClassVar[Layout] = BESIDE
    # Modules, and single weights, beside the language model.
    vision_modules: ClassVar[tuple[str, ...]] = ("vision_tower", "multi_modal_projector")
    vision_weights: ClassVar[tuple[str, ...]] = ()

    def __init__(self, hf_config: "PretrainedConfig") -> None:
        super().__init__(hf_config)
        text = self.text_config()
        self.language = MODEL_BRIDGES[self.language_architecture or _causal_architecture(text)](text)
        self.shared_fields = {  # type: ignore[misc]
            field: name if name == "tie_word_embeddings" else f"text_config.{name}"
            for field, name in self.language.shared_fields.items()
        }

    def text_config(self) -> "PretrainedConfig":
        """The language model's configuration, as its family reads it."""
        text = copy.deepcopy(self.hf_config.text_config)
        # transformers ties what the whole model's configuration says, whatever the text's does.
        text.tie_word_embeddings = self.hf_config.tie_word_embeddings
        return text

    def moe_layers(self) -> Sequence[bool] | None:
        return self.language.moe_layers()

    def further_changes(self, config: "TransformerConfig") -> dict[str, Any]:
        return {f"text_config.{name}": value for name, value in self.language.further_changes(config).items()}

    def shared_values(self) -> dict[str, Any]:
        return self.language.shared_values()

    def vision(self) -> "Vision":
        """The vision half."""
        from megatron.bridge.models.vision_half import Vision

        return Vision(self.hf_config)

    def language_fields(self) -> Mapping[str, Any]:
        """Provider fields in which the language model differs from the same family by itself."""
        return {}

    def provider_bridge(self) -> "VisionLanguageProvider":
        from megatron.bridge.models.vision_language_provider import VisionLanguageProvider

        # transformers gives these models an output layer of their own, which neither scales nor caps.
        fields = {"logits_multiplier": 1.0, "logits_softcap": None, **self.language_fields()}
        return VisionLanguageProvider.of(self.language.provider_bridge(), self.vision(), **fields)

    def mapping_registry(self) -> WeightTable:
        language = self.language.mapping_registry().under(self.language_prefix, self.layout.language)
        names = [f"{module}.**" for module in self.vision_modules] + list(self.vision_weights)
        return WeightTable.of(
            [WeightRule(f"{_VISION}{name}", f"{self.layout.vision}{name}") for name in names],
            language.rules,
            tied=language.tied,
            ignored=(*language.ignored, *self.ignored()),
            spellings=self.layout.spellings,
        )

    def ignored(self) -> tuple[str, ...]:
        """Hugging Face weights that carry nothing: positions that transformers stored before 4.31."""
        return ("vision_tower.embeddings.position_ids",)

    def tree_shapes(self) -> "Mapping[str, Shape]":
        import torch

        from megatron.bridge.models.vision_half import build_tower

        with torch.device("meta"):
            tower = build_tower(self.vision(), torch.float32, initialized=False)
        shapes = {name: tuple(value.shape) for name, value in tower.state_dict().items()}
        return {f"{_VISION}{name}": shape for name, shape in shapes.items() if name not in self.vision_weights}

    # --- for comparisons

    def special_tokens(self) -> Sequence[int]:
        vision = self.vision()
        return [vision.token_id(modality) for modality in vision.modalities]

    def probe_images(self, count: int, generator: "torch.Generator") -> "Mapping[str, torch.Tensor]":
        import torch

        return {"pixel_values": torch.randn(count, *self.image_shape(), generator=generator)}

    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width that the tower was made for."""
        size = self.hf_config.vision_config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return int(self.hf_config.vision_config.num_channels), int(height), int(width)


def _causal_architecture(text: "PretrainedConfig") -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type)
    if not isinstance(name, str) or name not in MODEL_BRIDGES:
        raise BridgeError(
            f"text_config: no family is offered for a language model of type {text.model_type!r}; "
            "see `megatron-bridge plugins` for those that are"
        )
    return name
