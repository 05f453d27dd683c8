"""The layers of hybrid models in the layer spec `torch`: PyTorch's modules in Megatron-Core's hybrid stack."""

import dataclasses
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron.bridge.models.layer_specs.mamba_mixer import CONVOLUTION_KEYS
from megatron.bridge.models.layer_specs.norms import torch_norm
from megatron.bridge.models.layer_specs.torch_spec import refuse_unsupported, with_torch_modules


class TorchHybridStack(HybridStack):
    """Megatron-Core's stack of layers, with PyTorch's norm behind the last one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The stock stack would end in Transformer Engine's norm.
        super().__init__(*args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = torch_norm(self.config, self.config.hidden_size, self.config.layernorm_epsilon)
            # What the layers add up may be in fp32, the weights behind it are not.
            self.final_norm.register_forward_hook(lambda norm, inputs, output: output.to(norm.weight.dtype))


def build_hybrid(config: TransformerConfig, mixer: ModuleSpec) -> ModuleSpec:
    """The stack's spec. A norm is keyed as part of the projection behind it, as in Megatron-Core's checkpoints.

    Args:
        config: the finished config of the model.
        mixer: of the state-space layers, without its projections.

    Raises:
        BridgeError: names each field of the config that these modules cannot honour, and what to set instead.
    """
    refuse_unsupported(config)
    dense, mixture = _parts(config, None), _parts(config, config.num_moe_experts)
    layers = HybridStackSubmodules(
        mamba_layer=_mamba_layer(mixer),
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=torch_norm,
                self_attention=dense.self_attention,
                self_attn_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
            ),
        ),
        mlp_layer=_mlp_layer(MLPLayer, dense.mlp, {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}),
        moe_layer=_mlp_layer(TransformerLayer, mixture.mlp, {}),
    )
    return ModuleSpec(module=TorchHybridStack, submodules=layers)


def _parts(config: TransformerConfig, experts: int | None) -> TransformerLayerSubmodules:
    """A GPT layer's parts; hybrid layers have one of them each."""
    parts = get_gpt_layer_local_submodules(
        num_experts=experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    return with_torch_modules(parts, config)


def _mamba_layer(mixer: ModuleSpec) -> ModuleSpec:
    projections = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=torch_norm,
            mixer=dataclasses.replace(mixer, submodules=projections),
            mamba_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_", **CONVOLUTION_KEYS},
        ),
    )


def _mlp_layer(module: type, mlp: Any, keys: dict[str, str]) -> ModuleSpec:
    submodules = TransformerLayerSubmodules(
        pre_mlp_layernorm=torch_norm, mlp=mlp, mlp_bda=get_bias_dropout_add, sharded_state_dict_keys_map=keys
    )
    return ModuleSpec(module=module, submodules=submodules)
