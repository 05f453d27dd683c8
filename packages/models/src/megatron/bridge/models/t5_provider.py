"""`T5ModelProvider`: everything that defines a T5 model, as one dataclass that can build it."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.block_variant import BlockVariant
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.model_provider import PreWrapHook

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallelConfig

# What a decoder alone can have: field -> the one value that T5's blocks know.
_ONLY: dict[str, Any] = {
    "position_embedding_type": "relative",
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
        if self.pipeline_model_parallel_size not in (1, 2):
            faults.append(
                f"pipeline_model_parallel_size={self.pipeline_model_parallel_size}: T5 has two stages at most, its "
                "encoder and its decoder; set it to 1 or 2 and raise tensor_model_parallel_size"
            )
        if self.layer_spec not in (None, "torch"):
            faults.append(f"layer_spec={self.layer_spec!r}: T5 is built from the modules of layer_spec='torch' only")
        if faults:
            raise BridgeError("T5 cannot be built as configured:\n  " + "\n  ".join(faults))
        # Stages are the two stacks, whatever their numbers of layers.
        config = GPTModelProvider.transformer_config(self.replace(pipeline_model_parallel_size=1))
        config.pipeline_model_parallel_size = self.pipeline_model_parallel_size
        config.perform_initialization &= not self.loads_weights
        return config

    def provide_distributed_model(
        self,
        ddp_config: "DistributedDataParallelConfig | None" = None,
        wrap_with_ddp: bool = True,
        pre_wrap_hook: PreWrapHook | None = None,
        seed: int = 1234,
    ) -> list[torch.nn.Module]:
        """As `ModelProvider`'s.

        Raises:
            BridgeError: also training on two pipeline stages.
        """
        if wrap_with_ddp and self.pipeline_model_parallel_size > 1:
            raise BridgeError(
                "T5 is converted and run on two pipeline stages, but not trained: both hold the embedding, and "
                "Megatron-Core would not keep its copies in step. Set pipeline_model_parallel_size=1 and raise "
                "tensor_model_parallel_size, or pass wrap_with_ddp=False"
            )
        return super().provide_distributed_model(ddp_config, wrap_with_ddp, pre_wrap_hook, seed)

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
        pg_collection: Any = None,
    ) -> torch.nn.Module:
        """The model, or on two pipeline stages the encoder or the decoder, on this process's device.

        Args:
            pre_process, post_process: hold the encoder, the decoder; None asks the pipeline stage.
            vp_stage: None; T5 has no virtual stages.
            pg_collection: None; T5 stands on Megatron-Core's parallel state.

        Raises:
            BridgeError: groups of the caller's own.
        """
        from megatron.core import parallel_state

        from megatron.bridge.models.layer_specs.t5_spec import decoder_block, encoder_block
        from megatron.bridge.models.t5_model import BridgeT5Model

        if pg_collection is not None:
            raise BridgeError("T5 cannot stand on process groups of its own; build it with provide_distributed_model()")
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
            add_encoder=parallel_state.is_pipeline_first_stage() if pre_process is None else pre_process,
            add_decoder=parallel_state.is_pipeline_last_stage() if post_process is None else post_process,
        )
        model.unpadded_vocab_size, model.layer_spec = self.vocab_size, "torch"
        return model
