"""A vision tower's layer: Megatron-Core's with PyTorch's norms and attention, where each patch sees all others."""

import dataclasses

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.models.layer_specs.decoder_block import with_canonical_keys
from megatron.bridge.models.layer_specs.torch_spec import refuse_unsupported, with_torch_modules


def vit_layer(config: TransformerConfig) -> ModuleSpec:
    """The layer, with the checkpoint keys of a decoder's.

    Raises:
        BridgeError: names each field of the config that these modules cannot honour.
    """
    refuse_unsupported(config)
    stock = get_gpt_layer_local_spec(normalization=config.normalization)
    layer = with_torch_modules(with_canonical_keys(stock.submodules), config)
    params = {**layer.self_attention.params, "attn_mask_type": AttnMaskType.no_mask}
    attention = dataclasses.replace(layer.self_attention, params=params)
    return dataclasses.replace(stock, submodules=dataclasses.replace(layer, self_attention=attention))
