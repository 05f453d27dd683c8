"""The layer spec `torch`: PyTorch's attention and norms in Megatron-Core's layers, on any device."""

import dataclasses
import functools

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs.biased_experts import with_fresh_outputs
from megatron.bridge.models.layer_specs.decoder_block import is_mixture_of_experts, stock_block, with_layers
from megatron.bridge.models.layer_specs.gated_attention import GatedSelfAttention
from megatron.bridge.models.layer_specs.gated_mlp import GatedMLP
from megatron.bridge.models.layer_specs.norms import NORMS, torch_norm
from megatron.bridge.models.layer_specs.rotary_cpu import RotarySelfAttention
from megatron.bridge.models.layer_specs.sdpa_attention import SDPAttention
from megatron.bridge.models.layer_specs.variant_attention import VariantAttention

# What the modules here cannot do: config field -> (the values that they can, what to do about another).
_SUPPORTED: dict[str, tuple[tuple[object, ...], str]] = {
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
    plain_attention = not config.multi_latent_attention and config.experimental_attention_variant is None
    refuse_unsupported(config, context_parallel=plain_attention)
    block = stock_block(config, vp_stage, engine=False, replaced="gated_delta_net")
    block = with_layers(block, lambda layer: with_torch_modules(layer, config))
    if config.experimental_attention_variant == "gated_delta_net":
        # Megatron-Core's state-space modules, and with them Triton's, are imported for models that have such layers.
        from megatron.bridge.models.layer_specs.linear_attention import with_linear_attention

        block = with_linear_attention(block, config, vp_stage)
    return dataclasses.replace(block, layer_norm=torch_norm)


def refuse_unsupported(config: TransformerConfig, *, context_parallel: bool = False) -> None:
    """Refuse a config that PyTorch's norms and attention cannot honour, naming each field and what to set instead.

    Args:
        config: of the model.
        context_parallel: whether all of the model's layers can work on parts of sequences.
    """
    faults = [
        f"{field}={getattr(config, field)!r}: {remedy}"
        for field, (supported, remedy) in _SUPPORTED.items()
        if getattr(config, field) not in supported
    ]
    if config.context_parallel_size > 1 and not context_parallel:
        faults.append(
            f"context_parallel_size={config.context_parallel_size}: only plain attention is divided along sequences; "
            "set it to 1, and use tensor and pipeline parallelism"
        )
    if faults:
        raise BridgeError("the layer spec 'torch' cannot do what the model config asks for:\n  " + "\n  ".join(faults))


def with_torch_modules(layer: TransformerLayerSubmodules, config: TransformerConfig) -> TransformerLayerSubmodules:
    """A stock layer's parts with PyTorch's norms and attention."""
    attention = layer.self_attention
    core = SDPAttention if config.softmax_type == "vanilla" else VariantAttention
    modules = dataclasses.replace(attention.submodules, core_attention=core)
    if config.qk_layernorm and not config.qk_l2_norm:
        norms = ("q_layernorm", "kv_layernorm" if config.multi_latent_attention else "k_layernorm")
        present = {name: torch_norm for name in norms if getattr(modules, name) is not IdentityOp}
        modules = dataclasses.replace(modules, **present)
    attention = dataclasses.replace(attention, submodules=modules)
    if config.attention_output_gate:
        attention = dataclasses.replace(attention, module=GatedSelfAttention)
    elif attention.module is SelfAttention:
        attention = dataclasses.replace(attention, module=RotarySelfAttention)
    mlp = layer.mlp
    if not is_mixture_of_experts(layer):
        mlp = functools.partial(GatedMLP.as_mlp_submodule, *mlp.args, **mlp.keywords)
    elif config.add_bias_linear:
        mlp = with_fresh_outputs(mlp)
    return dataclasses.replace(
        layer, input_layernorm=torch_norm, pre_mlp_layernorm=torch_norm, self_attention=attention, mlp=mlp
    )
