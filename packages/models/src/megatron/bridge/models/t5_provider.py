"""`T5ModelProvider`: everything that defines a T5 model, as one dataclass that can build it."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.block_variant import BlockVariant
from megatron.bridge.models.gpt_provider import GPTModelProvider

# What a decoder alone can have: field -> the one value that T5's blocks know.
_ONLY: dict[str, Any] = {
    "position_embedding_type": "relative",
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "num_moe_experts": None,
    "window_size": None,
    "num_labels": None,
    "rope_parameters": None,
    "fp16": False,
    "add_attention_output_bias": None,
    "add_mlp_bias": None,
    **{field.name: field.default for field in fields(BlockVariant)},
}
_REMEDIES: dict[str, str] = {
    "pipeline_model_parallel_size": "Megatron-Core's schedules no longer send an encoder's output from stage to stage; "
    "set it to 1 and raise tensor_model_parallel_size",
    "fp16": "T5's activations overflow in fp16; use bf16 or fp32",
}


@dataclass(kw_only=True)
class T5ModelProvider(GPTModelProvider):
    """An encoder-decoder model of the T5 kind on Megatron-Core's `T5Model`.

    `num_layers` counts the decoder's layers. Positions are relative: a learned bias per head and distance, one table
    for each stack, added to the attention scores of all its layers.

    Args:
        encoder_num_layers: layers of the encoder; None takes as many as the decoder has.
        relative_attention_num_buckets: distances that have a bias of their own.
        relative_attention_max_distance: distances from here on share the last one, in tokens.
        scale_output: the decoder's output is multiplied by hidden_size ** -0.5 before the output layer (T5 1.0).
    """

    position_embedding_type: str = "relative"
    encoder_num_layers: int | None = None
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    scale_output: bool = False

    def transformer_config(self) -> TransformerConfig:
        """As `GPTModelProvider`'s, of the decoder.

        Raises:
            BridgeError: also what T5's blocks do not have, or no parallel layout of theirs.
        """
        faults = [
            f"{name}={getattr(self, name)!r}: {_REMEDIES.get(name, f'T5 has {value!r} only')}"
            for name, value in _ONLY.items()
            if getattr(self, name) != value
        ]
        if self.layer_spec not in (None, "torch"):
            faults.append(f"layer_spec={self.layer_spec!r}: T5 is built from the modules of layer_spec='torch' only")
        if faults:
            raise BridgeError("T5 cannot be built as configured:\n  " + "\n  ".join(faults))
        return super().transformer_config()

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> torch.nn.Module:
        """The model, on this process's device; there is one pipeline stage."""
        from megatron.bridge.models.layer_specs.t5_spec import decoder_block, encoder_block
        from megatron.bridge.models.t5_model import BridgeT5Model

        config = self.transformer_config()
        encoder = self.replace(num_layers=self.encoder_num_layers or self.num_layers).transformer_config()
        encoder.perform_initialization = config.perform_initialization
        model = BridgeT5Model(
            config=config,
            encoder_config=encoder,
            transformer_encoder_layer_spec=encoder_block(encoder),
            transformer_decoder_layer_spec=decoder_block(config),
            vocab_size=self.padded_vocab_size,
            max_sequence_length=self.seq_length,
            fp16_lm_cross_entropy=self.fp16_lm_cross_entropy,
            parallel_output=self.parallel_output,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type=self.position_embedding_type,
            relative_attention_num_buckets=self.relative_attention_num_buckets,
            relative_attention_max_distance=self.relative_attention_max_distance,
            scale_output=self.scale_output,
        )
        model.unpadded_vocab_size, model.layer_spec = self.vocab_size, "torch"
        return model
