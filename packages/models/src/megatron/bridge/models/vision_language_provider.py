"""`VisionLanguageProvider`: a GPT provider whose model sees images."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.vision_half import Vision


@dataclass(kw_only=True)
class VisionLanguageProvider(GPTModelProvider):
    """The provider of the language model, and what stands before it.

    Args:
        vision: tower and projector.
    """

    vision: Vision | None = None
    # Features are put among the embeddings before sequence parallelism divides them.
    scatter_embedding_sequence_parallel: bool = False

    @classmethod
    def of(cls, language: GPTModelProvider, vision: Vision, **changes: object) -> "VisionLanguageProvider":
        """A language model's provider with a vision half before it, and other values for some of its fields."""
        values = {field.name: getattr(language, field.name) for field in dataclasses.fields(language) if field.init}
        values |= {"vision": vision, "scatter_embedding_sequence_parallel": False, **changes}
        return cls(**values)

    def transformer_config(self) -> TransformerConfig:
        """As `GPTModelProvider.transformer_config`.

        Raises:
            BridgeError: a parallel layout that has no place for images, besides.
        """
        if self.context_parallel_size > 1:
            raise BridgeError(
                f"context_parallel_size={self.context_parallel_size}: images are put among the embeddings of whole "
                "sequences; set it to 1 and divide the work by tensor and pipeline parallelism, or train the model "
                "taken apart (megatron.bridge.mimo.MimoProvider), where sequences are divided behind the images"
            )
        return super().transformer_config()

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
        pg_collection: Any = None,
    ) -> torch.nn.Module:
        """As `GPTModelProvider.provide`; the first chunk has tower and projector too.

        Raises:
            BridgeError: the first stage lacks layers that take an image's features.
        """
        from megatron.bridge.models.vision_language_model import VisionLanguageModel

        if self.vision is None:
            raise BridgeError("VisionLanguageProvider.vision is not set; use GPTModelProvider for a model of text")
        self._refuse_divided_deepstack(self.vision.deepstack)
        language = super().provide(pre_process, post_process, vp_stage, pg_collection)
        return VisionLanguageModel(language, self.vision, initialized=not self.loads_weights)  # type: ignore[arg-type]

    def _refuse_divided_deepstack(self, layers: int) -> None:
        from megatron.core.transformer.transformer_block import get_num_layers_to_build

        if not layers:
            return
        virtual = self.virtual_pipeline_model_parallel_size is not None
        first = get_num_layers_to_build(self.transformer_config(), vp_stage=0 if virtual else None, pp_rank=0)
        if first < layers:
            raise BridgeError(
                f"the first {layers} layers take features of images, and the first pipeline stage, which holds the "
                f"tower, has {first}; use fewer stages, or set num_layers_in_first_pipeline_stage={layers} or more"
            )
        if self.recompute_granularity == "full":
            raise BridgeError(
                "recompute_granularity='full' would lose the gradients of image features that are added between "
                "layers; use 'selective' or None"
            )
