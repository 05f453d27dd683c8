"""The layer spec `torch`: PyTorch's attention and norms in Megatron-Core's layers, on any device."""

import dataclasses

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs.biased_experts import with_fresh_outputs
from megatron.bridge.models.layer_specs.decoder_block import is_mixture_of_experts, stock_block, with_layers
from megatron.bridge.models.layer_specs.gated_attention import GatedAttention
from megatron.bridge.models.layer_specs.norms import NORMS, torch_norm
from megatron.bridge.models.layer_specs.sdpa_attention import SDPAttention
from megatron.bridge.models.layer_specs.variant_attention import VariantAttention

# What the modules here cannot do: config field -> (the values that they can, what to do about another).
_SUPPORTED: dict[str, tuple[tuple[object, ...], str]] = {
    "context_parallel_size": ((1,), "use layer_spec='transformer_engine', or tensor and pipeline parallelism"),
    "multi_latent_attention": ((False,), "use layer_spec='transformer_engine'"),
    "normalization": (tuple(NORMS), "use layer_spec='transformer_engine'"),
    "persist_layer_norm": ((False,), "it chooses a CUDA kernel of Apex; set it to False"),
    "memory_efficient_layer_norm": ((False,), "it chooses a CUDA kernel of Apex; set it to False"),
    "apply_query_key_layer_scaling": ((False,), "scores are in fp32 here, which it is for; set it to False"),
    "softmax_type": (("vanilla", "learnable"), "use layer_spec='transformer_engine'"),
    "qk_clip": ((False,), "use layer_spec='transformer_engine'"),
}


def build(config: TransformerConfig, *, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The stock block with PyTorch's norms and attention; see `LayerSpecBuilder`.

    Raises:
        BridgeError: names each field of the config that these modules cannot honour, and what to set instead.
    """
    _refuse_unsupported(config)
    block = with_layers(stock_block(config, vp_stage, engine=False), lambda layer: _with_torch_modules(layer, config))
    return dataclasses.replace(block, layer_norm=torch_norm)


def _refuse_unsupported(config: TransformerConfig) -> None:
    faults = [
        f"{field}={getattr(config, field)!r}: {remedy}"
        for field, (supported, remedy) in _SUPPORTED.items()
        if getattr(config, field) not in supported
    ]
    if faults:
        raise BridgeError("the layer spec 'torch' cannot do what the model config asks for:\n  " + "\n  ".join(faults))


def _with_torch_modules(layer: TransformerLayerSubmodules, config: TransformerConfig) -> TransformerLayerSubmodules:
    attention = layer.self_attention
    core = SDPAttention if config.softmax_type == "vanilla" else VariantAttention
    modules = dataclasses.replace(attention.submodules, core_attention=core)
    if config.qk_layernorm and not config.qk_l2_norm:
        modules = dataclasses.replace(modules, q_layernorm=torch_norm, k_layernorm=torch_norm)
    if config.attention_output_gate:
        attention = dataclasses.replace(attention, module=GatedAttention)
    mlp = layer.mlp
    if config.add_bias_linear and is_mixture_of_experts(layer):
        mlp = with_fresh_outputs(mlp)
    return dataclasses.replace(
        layer,
        input_layernorm=torch_norm,
        pre_mlp_layernorm=torch_norm,
        self_attention=dataclasses.replace(attention, submodules=modules),
        mlp=mlp,
    )
