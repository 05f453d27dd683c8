"""A GPT model of heterogeneous layers: makes their inputs, and passes what they share to the next pipeline stage."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.gpt_model import BridgeGPTModel
from megatron.bridge.models.heterogeneous_layers import HeterogeneousLayers
from megatron.bridge.models.layer_specs.layer_states import LayerStates
from megatron.bridge.models.layer_specs.norms import torch_norm
from megatron.bridge.models.layer_specs.replicated_linear import replicated_linear


class HeterogeneousGPTModel(BridgeGPTModel):
    """Megatron-Core's GPT model, of `HeterogeneousLayer`s.

    What goes to the next pipeline stage is wider than the hidden states, so the config says `variable_seq_lengths`,
    with which the stages tell each other the shapes.

    Args:
        layers: how the layers differ.
        input_rows: rows of the table of layer inputs, padded to the layout.
    """

    def __init__(self, *args: Any, layers: HeterogeneousLayers, input_rows: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        first = get_transformer_layer_offset(self.config, self.vp_stage, self.pg_collection.pp.rank())
        self.states = LayerStates(layers, self.config, first)
        self.next_layer = first + len(self.decoder.layers)
        for layer in self.decoder.layers:
            layer.states = layer.self_attention.states = self.states
        if self.pre_process and layers.input_size:
            count = len(layers.sizes)
            self.layer_inputs = LayerInputs(self.config, input_rows, count, layers.input_size, self.pg_collection.tp)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take what the stage before has sent."""
        (given,) = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        super().set_input_tensor(given if given is None else self.states.unpack(given))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Megatron-Core's; a stage that is not the last gives hidden states with what later layers need beside."""
        output: Tensor = super().forward(*args, **kwargs)
        if not self.post_process:
            output = self.states.packed(output, self.next_layer)
        self.states.clear()
        return output

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, decoder_input: Any = None, **kwargs: Any) -> Any:
        if decoder_input is not None and hasattr(self, "layer_inputs"):
            raise BridgeError("layers have inputs made from the tokens, which embeddings in their place do not tell")
        prepared = super()._preprocess(input_ids, position_ids, decoder_input, **kwargs)
        if hasattr(self, "layer_inputs"):
            self.states.inputs = self.layer_inputs(input_ids, prepared[0])
        return prepared


class LayerInputs(MegatronModule):
    """Makes every layer's input from the tokens (a table of its own) and their embeddings (a projection).

    Args:
        config: of the model.
        rows: of the table, which is divided along them over tensor-parallel ranks.
        layers: how many there are.
        size: channels of each one's input.
        group: the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, rows: int, layers: int, size: int, group: Any) -> None:
        super().__init__(config)
        self.layers, self.size, self.scale = layers, size, config.hidden_size**-0.5
        self.word_embeddings = VocabParallelEmbedding(
            rows,
            layers * size,
            init_method=config.embedding_init_method or config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=group,
        )
        self.projection = replicated_linear(config, config.hidden_size, layers * size)
        self.norm = torch_norm(config, size, config.layernorm_epsilon)

    def forward(self, tokens: Tensor, embeddings: Tensor) -> Tensor:
        """`[sequence, batch, layers * size]` of tokens `[batch, sequence]` and embeddings as the layers get them."""
        table = self.word_embeddings(tokens)
        if not self.word_embeddings.reduce_scatter_embeddings:
            table = table.transpose(0, 1)
        # The factor is rounded to the weights' dtype, as that on the embeddings.
        table = table * torch.tensor(self.size**0.5, dtype=table.dtype, device=table.device)
        projected = self.norm((self.projection(embeddings) * self.scale).unflatten(-1, (self.layers, self.size)))
        return (projected.flatten(-2) + table) * 2.0**-0.5
