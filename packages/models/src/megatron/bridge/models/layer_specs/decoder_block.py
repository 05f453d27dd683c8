"""The stock decoder block of Megatron-Core, from which every spec of this package starts.

Starting from the stock block keeps one set of checkpoint keys; a spec says only which modules it exchanges.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs.latent_attention import with_latent_attention


def stock_block(
    config: TransformerConfig, vp_stage: int | None, *, engine: bool, replaced: str | None = None
) -> TransformerBlockSubmodules:
    """Megatron-Core's own block for this rank, with Transformer Engine's modules (`engine`) or with its local ones.

    Args:
        config: of the model.
        vp_stage: virtual pipeline stage, or None.
        engine: whose modules.
        replaced: the attention variant that the caller puts in place of attention itself.

    Raises:
        BridgeError: the config asks for an attention variant that needs a spec of its own.
    """
    if config.experimental_attention_variant not in (None, replaced):
        raise BridgeError(
            f"experimental_attention_variant={config.experimental_attention_variant!r} of the model config has no "
            "module in this layer spec; set it to None, or ('gated_delta_net') use layer_spec='torch'"
        )
    plain = copy.copy(config)
    plain.experimental_attention_variant = None
    block = get_gpt_decoder_block_spec(
        plain,
        use_transformer_engine=engine,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    if config.multi_latent_attention:
        block = with_layers(block, lambda layer: with_latent_attention(layer, config))
    return block if engine else with_layers(block, with_canonical_keys)


def with_layers(
    block: TransformerBlockSubmodules, change: Callable[[TransformerLayerSubmodules], TransformerLayerSubmodules]
) -> TransformerBlockSubmodules:
    """The block with every layer's submodules changed; the original is left alone."""

    def changed(layer: ModuleSpec) -> ModuleSpec:
        return dataclasses.replace(layer, submodules=change(layer.submodules))

    return dataclasses.replace(block, layer_specs=[changed(layer) for layer in block.layer_specs or []])


def is_mixture_of_experts(layer: TransformerLayerSubmodules) -> bool:
    """Whether the layer's MLP is a mixture of experts."""
    return isinstance(layer.mlp, functools.partial) and layer.mlp.func is MoELayer


def with_canonical_keys(layer: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    """The layer with the checkpoint keys that Transformer Engine's layers have.

    A dense layer's norm is keyed as part of the linear layer behind it, a mixture of experts keeps its norm apart. The
    stock local spec maps both alike: as a dense layer's, or under multi-latent attention not at all.
    """
    keys = {key: value for key, value in layer.sharded_state_dict_keys_map.items() if key != "pre_mlp_layernorm."}
    if not is_mixture_of_experts(layer):
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return dataclasses.replace(layer, sharded_state_dict_keys_map=keys)
