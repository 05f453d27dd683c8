"""`MLAModelProvider`: a GPT model whose attention keeps keys and values in a small latent vector."""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron.bridge.models.gpt_provider import GPTModelProvider


@dataclass(kw_only=True)
class MLAModelProvider(GPTModelProvider, MLATransformerConfig):
    """A GPT model with multi-latent attention: `MLATransformerConfig`'s fields beside `GPTModelProvider`'s.

    `rope_parameters` holds for the rotated part of each head; `rope_type` only says whether they are plain (`rope`) or
    not (`yarn`).
    """

    config_class: ClassVar[type[TransformerConfig]] = MLATransformerConfig

    multi_latent_attention: bool = True
    # Megatron-Core says `int`, and takes None for queries without a latent.
    q_lora_rank: int | None = 512

    def _turn_positions(self, model: Any) -> None:
        from megatron.bridge.models.rotary import apply_latent_rope_parameters

        if self.rope_parameters is not None:
            positions = self.max_position_embeddings or self.seq_length
            apply_latent_rope_parameters(model, self.rope_parameters, positions)
