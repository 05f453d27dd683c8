"""Llama 4 of Meta, its text model (2025)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.errors import BridgeError
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.dense import shared_fields
from megatron.bridge.models.families.moe import MoEBridge
from megatron.bridge.models.fragments import HFNames
from megatron.bridge.models.routing import balancing, sigmoid_of_chosen

_HF_MOE = "model.layers.{l}.feed_forward"


class Llama4Bridge(MoEBridge):
    """`Llama4ForCausalLM`: layers that rotate see their own chunk only, the others see all; one expert per token.

    The router's weight is on what the expert reads.
    """

    shared_fields: ClassVar[dict[str, str]] = shared_fields(
        ffn_hidden_size="intermediate_size_mlp",
        moe_ffn_hidden_size="intermediate_size",
        num_moe_experts="num_local_experts",
    )
    names = HFNames(fc1=("feed_forward.gate_proj", "feed_forward.up_proj"), fc2="feed_forward.down_proj")

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    output_bias = qkv_bias

    def windows(self) -> Sequence[int | None]:
        return [None] * self.hf_config.num_hidden_layers

    def chunks(self) -> list[int | None]:
        """Per layer, how many tokens make a chunk."""
        config = self.hf_config
        if unknown := set(config.layer_types) - {"chunked_attention", "full_attention"}:
            raise BridgeError(f"config.json: layer_types {sorted(unknown)} are not supported in this family")
        return [config.attention_chunk_size if kind == "chunked_attention" else None for kind in config.layer_types]

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        turned = [int(bool(turns)) for turns in config.no_rope_layers[: config.num_hidden_layers]]
        still = [1 - turns for turns in turned]
        tuned = config.attn_temperature_tuning
        return {
            "rotary_interleaved": True,
            "no_rope_freq": still,
            "attention_chunks": self.chunks(),
            "qk_l2_norm_layers": turned if config.use_qk_norm else None,
            "query_temperature": (config.attn_scale, config.floor_scale) if tuned else None,
            "query_temperature_start": 1,
            "query_temperature_layers": still,
        }

    def moe_layers(self) -> Sequence[bool]:
        return [layer in self.hf_config.moe_layers for layer in range(self.hf_config.num_hidden_layers)]

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        if config.num_experts_per_tok != 1:
            raise BridgeError(
                f"config.json: num_experts_per_tok={config.num_experts_per_tok}; Megatron-Core weighs what experts "
                "read where there is one per token only"
            )
        return {
            **sigmoid_of_chosen(1, normalised=False),
            **balancing(config.router_aux_loss_coef),
            "moe_apply_probs_on_input": True,
            "moe_shared_expert_intermediate_size": config.intermediate_size,
        }

    def moe_rules(self) -> list[WeightRule]:
        experts = f"{_HF_MOE}.experts"
        return [
            *moe.moe_norm(),
            *moe.router(f"{_HF_MOE}.router"),
            *moe.stacked_experts(f"{experts}.gate_up_proj", f"{experts}.down_proj", transposed=True),
            *moe.shared_experts(f"{_HF_MOE}.shared_expert"),
        ]
