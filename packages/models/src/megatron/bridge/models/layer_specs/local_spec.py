"""The layer spec `local`: stock Megatron-Core modules, without Transformer Engine."""

import dataclasses

from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs.decoder_block import stock_block


def build(config: TransformerConfig, *, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Stock local modules; see `LayerSpecBuilder`.

    Raises:
        BridgeError: sequence or context parallelism or multi-latent attention, which these modules do not have.
    """
    if config.multi_latent_attention:
        raise BridgeError(
            "the layer spec 'local' cannot do multi_latent_attention=True (its core attention takes values of the same "
            "size as keys only); use layer_spec='torch'"
        )
    if config.sequence_parallel:
        raise BridgeError(
            "the layer spec 'local' cannot do sequence_parallel=True (its norms do not mark their weights for the "
            "gradient reduction); use layer_spec='torch', or set sequence_parallel=False"
        )
    if config.context_parallel_size > 1:
        raise BridgeError(
            f"the layer spec 'local' cannot do context_parallel_size={config.context_parallel_size}; use "
            "layer_spec='torch', or set context_parallel_size=1"
        )
    block = stock_block(config, vp_stage, engine=False)
    if config.normalization == "RMSNorm":
        # The stock block's final norm would be Apex's LayerNorm where Apex is installed, and that refuses RMSNorm.
        block = dataclasses.replace(block, layer_norm=WrappedTorchNorm)
    return block
