"""Linear attention in place of some layers' attention (`experimental_attention_variant="gated_delta_net"`)."""

import dataclasses

from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_linear_attention_pattern
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset
from torch import Tensor, nn

from megatron.bridge.models.layer_specs.gated_delta_net import TorchGatedDeltaNet


def with_linear_attention(
    block: TransformerBlockSubmodules, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """This rank's block with a gated delta net in the layers that `config.linear_attention_freq` names."""
    linear = get_linear_attention_pattern(config)
    specs = block.layer_specs or []
    layers = [
        dataclasses.replace(spec, submodules=_linear(spec.submodules)) if linear[number] else spec
        for number, spec in zip(_layer_numbers(config, vp_stage, len(specs)), specs, strict=True)
    ]
    return dataclasses.replace(block, layer_specs=layers)


def _layer_numbers(config: TransformerConfig, vp_stage: int | None, count: int) -> list[int]:
    """Places of this rank's layers in the whole model, from 0."""
    if config.pipeline_model_parallel_layout is not None:
        numbers = config.pipeline_model_parallel_layout.get_layer_id_list(LayerType.decoder, vp_stage=vp_stage)
        return list(numbers)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return list(range(first, first + count))


def _linear(layer: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    keys = {key: value for key, value in layer.sharded_state_dict_keys_map.items() if key != "input_layernorm."}
    attention = ModuleSpec(
        module=TorchGatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=ColumnParallelLinear, out_norm=ValueNorm, out_proj=RowParallelLinear
        ),
    )
    return dataclasses.replace(
        layer,
        self_attention=attention,
        sharded_state_dict_keys_map={**keys, "input_layernorm.": "self_attention.in_proj.layer_norm_"},
    )


class ValueNorm(nn.RMSNorm):
    """The norm before the gate. Its weight is the factor itself, also where the model's other norms have 1 + weight.

    Every tensor-parallel rank norms its own heads with the same weight; the gradients are added up.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        self.ranks = config.tensor_model_parallel_size

    def forward(self, x: Tensor) -> Tensor:
        """`[..., channels of a head]` in and out."""
        weight = copy_to_tensor_model_parallel_region(self.weight) if self.ranks > 1 else self.weight
        return nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)
