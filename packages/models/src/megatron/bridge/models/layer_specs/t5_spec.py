"""T5's encoder and decoder blocks: Megatron-Core's layers with PyTorch's norms and attention, on any device."""

import dataclasses

from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec, encoder_model_with_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.models.layer_specs.biased_attention import BiasedAttention
from megatron.bridge.models.layer_specs.norms import torch_norm
from megatron.bridge.models.layer_specs.sdpa_attention import SDPAttention
from megatron.bridge.models.layer_specs.torch_spec import refuse_unsupported


def encoder_block(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The encoder's layers, `config.num_layers` of them, and its final norm.

    Raises:
        BridgeError: names each field of the config that these modules cannot honour.
    """
    return _block(encoder_model_with_local_spec(), config)


def decoder_block(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The decoder's layers, with attention to the encoder, and its final norm; otherwise as `encoder_block`."""
    spec = decoder_model_with_local_spec()
    cross = _with_core(spec.submodules.cross_attention, SDPAttention)
    layer = dataclasses.replace(spec.submodules, cross_attention=cross, pre_cross_attn_layernorm=torch_norm)
    return _block(dataclasses.replace(spec, submodules=layer), config)


def _block(spec: ModuleSpec, config: TransformerConfig) -> TransformerBlockSubmodules:
    refuse_unsupported(config)
    layer = dataclasses.replace(
        spec.submodules,
        input_layernorm=torch_norm,
        pre_mlp_layernorm=torch_norm,
        self_attention=_with_core(spec.submodules.self_attention, BiasedAttention),
    )
    layers = [dataclasses.replace(spec, submodules=layer)] * config.num_layers
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=torch_norm)


def _with_core(attention: ModuleSpec, core: type) -> ModuleSpec:
    return dataclasses.replace(attention, submodules=dataclasses.replace(attention.submodules, core_attention=core))
