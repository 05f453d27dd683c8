"""The layers for multi-token prediction behind a decoder, of the modules that the decoder has."""

import dataclasses

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.errors import BridgeError


def prediction_block(
    decoder: TransformerBlockSubmodules | ModuleSpec, config: TransformerConfig, *, engine: bool, vp_stage: int | None
) -> MultiTokenPredictionBlockSubmodules | None:
    """Megatron-Core's block, its layers like the decoder's last and with the decoder's norms; None on other stages.

    Args:
        decoder: the spec of this stage's layers.
        config: of the model.
        engine: with Transformer Engine's projections.
        vp_stage: virtual pipeline stage.

    Raises:
        BridgeError: the layer spec gives no block of layers.
    """
    if not config.mtp_num_layers:
        return None
    if not isinstance(decoder, TransformerBlockSubmodules):
        raise BridgeError("mtp_num_layers: the layer spec gives no block of layers to follow; use layer_spec='torch'")
    block = get_gpt_mtp_block_spec(config, decoder, use_transformer_engine=engine, vp_stage=vp_stage)
    if block is None:
        return None
    norms = dict.fromkeys(("enorm", "hnorm", "layer_norm"), decoder.layer_norm)
    layers = [
        dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, **norms))
        for layer in block.layer_specs or ()
    ]
    return dataclasses.replace(block, layer_specs=layers)
