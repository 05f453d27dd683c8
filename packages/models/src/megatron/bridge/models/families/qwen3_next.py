"""Qwen3-Next and Qwen3.5 (2025): gated delta nets in most layers, gated attention in the others."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.bridge.conversion.table import WeightRule, WeightTable
from megatron.bridge.conversion.transforms import GatherRows, Transform
from megatron.bridge.models import ssm_fragments
from megatron.bridge.models.families.dense import DenseBridge, shared_fields
from megatron.bridge.models.families.qwen2_moe import Qwen2MoeBridge

_LINEAR = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)


class Qwen35Bridge(DenseBridge):
    """`Qwen3_5ForCausalLM`: norms by 1 + weight, and a gate on what attention gives."""

    shared_fields = shared_fields(**{name: name for name in _LINEAR})
    # What the delta net's first projection is made of.
    inputs: tuple[str, ...] = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    output_bias = qkv_bias

    def qk_norm(self) -> bool:
        return True

    def windows(self) -> Sequence[int | None]:
        return []

    def differences(self) -> Mapping[str, Any]:
        return {
            "layernorm_zero_centered_gamma": True,
            "attention_output_gate": True,
            "experimental_attention_variant": "gated_delta_net",
            "linear_attention_freq": [int(kind == "linear_attention") for kind in self.hf_config.layer_types],
        }

    def fused_qkv(self) -> Transform:
        config = self.hf_config
        return ssm_fragments.gated_qkv(
            heads=config.num_attention_heads, groups=config.num_key_value_heads, head_dim=config.head_dim
        )

    def input_runs(self) -> GatherRows:
        """How `inputs` make up the blocks q, k, v, z, beta and alpha."""
        config = self.hf_config
        values = config.linear_num_value_heads * config.linear_value_head_dim
        qkv = 2 * config.linear_num_key_heads * config.linear_key_head_dim + values
        sizes = (qkv, values, config.linear_num_value_heads, config.linear_num_value_heads)
        return GatherRows(tuple((source, 0, rows) for source, rows in enumerate(sizes)))

    def mapping_registry(self) -> WeightTable:
        config, layer = self.hf_config, self.names.layer
        delta_net = ssm_fragments.gated_delta_net(
            f"{layer}.linear_attn",
            self.inputs,
            self.input_runs(),
            key_channels=config.linear_num_key_heads * config.linear_key_head_dim,
            value_channels=config.linear_num_value_heads * config.linear_value_head_dim,
            value_heads=config.linear_num_value_heads,
        )
        norm = WeightRule(
            "decoder.layers.{l}.self_attention.in_proj.layer_norm_weight", f"{layer}.{self.names.input_norm}.weight"
        )
        table = super().mapping_registry()
        return dataclasses.replace(table, rules=(*table.rules, norm, *delta_net))


class Qwen35MoeBridge(Qwen35Bridge, Qwen2MoeBridge):
    """`Qwen3_5MoeForCausalLM`: the same with mixtures of experts, one of them shared."""

    shared_fields = shared_fields(
        without=["ffn_hidden_size"],
        moe_ffn_hidden_size="moe_intermediate_size",
        num_moe_experts="num_experts",
        **{name: name for name in _LINEAR},
    )

    def moe_layers(self) -> Sequence[bool]:
        return [True] * self.hf_config.num_hidden_layers

    def normalised(self) -> bool:
        return True


class Qwen3NextBridge(Qwen35Bridge, Qwen2MoeBridge):
    """`Qwen3NextForCausalLM`: with two projections in which the delta net's blocks stand key head by key head."""

    shared_fields = shared_fields(
        moe_ffn_hidden_size="moe_intermediate_size", num_moe_experts="num_experts", **{name: name for name in _LINEAR}
    )
    inputs = ("in_proj_qkvz", "in_proj_ba")

    def input_runs(self) -> GatherRows:
        config = self.hf_config
        shared_by = config.linear_num_value_heads // config.linear_num_key_heads
        key, value = config.linear_key_head_dim, shared_by * config.linear_value_head_dim
        sizes = [(key, key, value, value), (shared_by, shared_by)]
        return ssm_fragments.by_key_head(config.linear_num_key_heads, sizes)
