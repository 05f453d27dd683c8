"""Falcon-H1 of TII (arXiv:2507.22448)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron.bridge.conversion import hf_config
from megatron.bridge.conversion.table import WeightTable
from megatron.bridge.models import ssm_fragments
from megatron.bridge.models.families.dense import DenseBridge, refuse_other_values, shared_fields
from megatron.bridge.models.fragments import HFNames
from megatron.bridge.models.mamba_beside_attention import MambaBesideAttention

_ONLY = {"hidden_act": "silu", "mamba_conv_bias": True, "mamba_proj_bias": False, "projectors_bias": False}


def scaled(activation: Callable[[Tensor], Tensor], factor: float, x: Tensor) -> Tensor:
    """The activation of x times a factor."""
    return activation(x * factor)


class FalconH1Bridge(DenseBridge):
    """`FalconH1ForCausalLM`: attention and a Mamba-2 mixer read the same input; factors on nearly everything."""

    shared_fields = shared_fields(
        mamba_num_heads="mamba_n_heads",
        mamba_head_dim="mamba_d_head",
        mamba_num_groups="mamba_n_groups",
        mamba_state_dim="mamba_d_state",
        embedding_multiplier="embedding_multiplier",
        logits_multiplier="lm_head_multiplier",
    )
    names = HFNames(
        final_norm="model.final_layernorm",
        mlp_norm="pre_ff_layernorm",
        fc1=("feed_forward.gate_proj", "feed_forward.up_proj"),
        fc2="feed_forward.down_proj",
    )

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    output_bias = qkv_bias

    def mlp_bias(self) -> bool:
        return bool(self.hf_config.mlp_bias)

    def windows(self) -> Sequence[int | None]:
        return []

    def activation_function(self) -> Any:
        return functools.partial(scaled, super().activation_function(), self.hf_config.mlp_multipliers[0])

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        refuse_other_values(config, _ONLY)
        mixer = {
            "d_conv": config.mamba_d_conv,
            "rmsnorm": config.mamba_rms_norm,
            "norm_before_gate": config.mamba_norm_before_gate,
            "step_limit": tuple(config.time_step_limit),
            "multipliers": tuple(config.ssm_multipliers),
        }
        return {
            # Keys times a factor are scores times that factor.
            "softmax_scale": config.key_multiplier * hf_config.head_dim(config) ** -0.5,
            "mlp_multiplier": config.mlp_multipliers[1],
            "mamba_beside_attention": MambaBesideAttention(
                attention_in=config.attention_in_multiplier,
                attention_out=config.attention_out_multiplier,
                mixer_in=config.ssm_in_multiplier,
                mixer_out=config.ssm_out_multiplier,
                mixer=mixer,
            ),
        }

    def mapping_registry(self) -> WeightTable:
        config = self.hf_config
        mixer = ssm_fragments.mamba2(
            f"{self.names.layer}.mamba",
            heads=config.mamba_n_heads,
            channels=config.mamba_n_heads * config.mamba_d_head,
            groups=config.mamba_n_groups,
            state=config.mamba_d_state,
            norm=config.mamba_rms_norm,
            place="self_attention.mixer",
        )
        table = super().mapping_registry()
        return dataclasses.replace(table, rules=(*table.rules, *mixer))
