"""Decoder layers of different sizes, with inputs of their own beside the hidden states (Gemma 3n and 4)."""

import copy
import dataclasses
import functools
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset
from torch import Tensor, nn

from megatron.bridge.models.heterogeneous_layers import HeterogeneousLayers
from megatron.bridge.models.layer_specs.decoder_layer import VariantLayer
from megatron.bridge.models.layer_specs.experts_beside_mlp import ExpertsBesideMLP, ScaledRouter
from megatron.bridge.models.layer_specs.heterogeneous_attention import HeterogeneousAttention
from megatron.bridge.models.layer_specs.layer_states import LayerStates
from megatron.bridge.models.layer_specs.norms import torch_norm
from megatron.bridge.models.layer_specs.replicated_linear import replicated_linear


class HeterogeneousLayer(VariantLayer):
    """A layer with a config of its own, an input of its own where the model has those, and a scale on what it gives.

    Args:
        layers: how the model's layers differ.
    """

    states: LayerStates  # set by the model, which shares one between its layers

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *,
        layers: HeterogeneousLayers,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        **kwargs: Any,
    ) -> None:
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.layer = layer_number - 1 + get_transformer_layer_offset(config, vp_stage, groups.pp.rank())
        own = copy.copy(config)
        vars(own).update(layers.sizes[self.layer])
        super().__init__(own, submodules, layer_number, pg_collection=groups, vp_stage=vp_stage, **kwargs)
        self.layer_input = LayerInput(own, layers.input_size) if layers.input_size else None
        self.register_buffer("layer_scalar", torch.ones(1, dtype=config.params_dtype))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron-Core's: `[sequence, batch, hidden]` in and out, with the context."""
        output, context = super().forward(*args, **kwargs)
        if self.layer_input is not None:
            output = output + self.layer_input(output, self.states.input_of(self.layer))
        return output * self.layer_scalar, context


class LayerInput(nn.Module):
    """What a layer makes of its own input: a projection of it, gated by the hidden states, and normed.

    The weights are small, so every tensor-parallel rank holds them whole.
    """

    def __init__(self, config: TransformerConfig, size: int) -> None:
        super().__init__()
        self.activation = config.activation_func
        self.gate = replicated_linear(config, config.hidden_size, size)
        self.projection = replicated_linear(config, size, config.hidden_size)
        self.norm = torch_norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden: Tensor, given: Tensor) -> Tensor:
        """`[..., hidden]` of hidden states and `[..., size]`."""
        output: Tensor = self.norm(self.projection(self.activation(self.gate(hidden)) * given))
        return output


def with_heterogeneous_parts(
    layer: TransformerLayerSubmodules, layers: HeterogeneousLayers
) -> TransformerLayerSubmodules:
    """A `torch` layer's parts with attention that may share keys and values, and experts beside the MLP."""
    attention = layer.self_attention
    params = {**(attention.params or {}), "layers": layers}
    changed = dataclasses.replace(
        layer, self_attention=dataclasses.replace(attention, module=HeterogeneousAttention, params=params)
    )
    if not layers.experts_beside_mlp:
        return changed
    modules = dataclasses.replace(layer.mlp.keywords["submodules"], router=ScaledRouter)
    mixture = functools.partial(ExpertsBesideMLP, *layer.mlp.args, **{**layer.mlp.keywords, "submodules": modules})
    return dataclasses.replace(changed, mlp=mixture, pre_mlp_layernorm=IdentityOp)
