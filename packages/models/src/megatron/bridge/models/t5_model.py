"""Megatron-Core's T5 model, computing what the published T5 does."""

import copy
from typing import Any

from megatron.core.models.T5 import T5Model
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron.bridge.models.gpt_model import BridgeLanguageModel


class BridgeT5Model(BridgeLanguageModel, T5Model):
    """`T5Model` with an output layer without a bias, whose input may be scaled, as in T5 1.0.

    Forward takes masks as Megatron-Core does: True where a query must not see a key, broadcast to
    `[batch, 1, queries, keys]`; the decoder's own causal mask is added. On two pipeline stages the first holds the
    encoder, the second the decoder, and both the embedding.

    Args:
        config: of the model and its decoder.
        encoder_config: of the encoder.
        scale_output: the decoder's output is multiplied by hidden_size ** -0.5 before the output layer.
        kwargs: as `T5Model`'s.
    """

    def __init__(
        self, *, config: TransformerConfig, encoder_config: TransformerConfig, scale_output: bool, **kwargs: Any
    ) -> None:
        # Each stack lies on one stage and numbers its layers from the first.
        blocks = [_on_one_stage(each) for each in (config, encoder_config)]
        super().__init__(config=blocks[0], encoder_config=blocks[1], **kwargs)
        self.config = config
        self.encoder_num_layers = encoder_config.num_layers
        # Megatron-Core registers the output layer twice, and gives it a bias where it is tied to the embedding.
        del self.lm_head.output_layer
        object.__setattr__(self.lm_head, "output_layer", self.output_layer)
        self.output_layer.bias = None
        if scale_output:
            self.lm_head.register_forward_pre_hook(_Scale(config.hidden_size**-0.5), with_kwargs=True)
        if not self.add_decoder:
            del self.lm_head, self.output_layer, self.decoder_relative_pos_emb
            self.post_process = False
        if not self.add_encoder:
            del self.encoder_relative_pos_emb

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `T5Model`'s; the decoder's stage takes the encoder's output from the stage before."""
        if not self.add_encoder:
            kwargs["encoder_hidden_states"] = self.encoder_hidden_state
        output: Tensor = super().forward(*args, **kwargs)
        return output

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> Any:
        """As Megatron-Core's, without the output layer's empty extra state, which its GPT model leaves out too."""
        state = super().sharded_state_dict(prefix, *args, **kwargs)
        state.pop(f"{prefix}output_layer._extra_state", None)
        if not self.add_encoder:
            embedding = state[f"{prefix}embedding.word_embeddings.weight"]
            embedding.replica_id = (1, *embedding.replica_id[1:])  # a copy of the first stage's
        return state


def _on_one_stage(config: TransformerConfig) -> TransformerConfig:
    own = copy.copy(config)
    own.pipeline_model_parallel_size = 1
    return own


class _Scale:
    """A forward pre-hook that multiplies a module's first input."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> Any:
        return (inputs[0] * self.factor, *inputs[1:]), named
