"""AFM mixtures of experts of Arcee: Trinity (2025)."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.bridge.conversion import hf_config
from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.conversion.transforms import InterleaveGroups
from megatron.bridge.errors import BridgeError
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.moe import MoEBridge
from megatron.bridge.models.fragments import HFNames
from megatron.bridge.models.routing import balancing, sigmoid_routing

_HF_MLP = "model.layers.{l}.mlp"


class AfmoeBridge(MoEBridge):
    """`AfmoeForCausalLM`: gated attention, norms before and behind, and no rotation in layers without a window."""

    names = HFNames(
        qkv=tuple(f"self_attn.{name}_proj" for name in ("q", "gate", "k", "v")),
        mlp_norm="pre_mlp_layernorm",
        mlp_post_norm="post_mlp_layernorm",
    )

    def qk_norm(self) -> bool:
        return True

    def fused_qkv(self) -> InterleaveGroups:
        config, size = self.hf_config, hf_config.head_dim(self.hf_config)
        queries = config.num_attention_heads // config.num_key_value_heads * size
        return InterleaveGroups((queries, queries, size, size))

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        if config.attention_bias:
            raise BridgeError("config.json: attention_bias=True, which Megatron-Core has for the gate as well or not")
        return {
            "post_norm": True,
            "attention_output_gate": True,
            "embedding_multiplier": config.hidden_size**0.5 if config.mup_enabled else 1.0,
            "no_rope_freq": [int(window is None) for window in self.windows()],
        }

    def moe_layers(self) -> Sequence[bool]:
        return [layer >= self.hf_config.num_dense_layers for layer in range(self.hf_config.num_hidden_layers)]

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        return {
            **sigmoid_routing(config.num_experts_per_tok, normalised=True, scaling=config.route_scale),
            # The bias is what balances the experts.
            **balancing(None),
            "moe_shared_expert_intermediate_size": config.moe_intermediate_size * config.num_shared_experts,
        }

    def moe_rules(self) -> list[WeightRule]:
        norms = [
            *moe.moe_norm("model.layers.{l}.pre_mlp_layernorm"),
            *moe.moe_post_norm("model.layers.{l}.post_mlp_layernorm"),
        ]
        router = moe.router(f"{_HF_MLP}.router.gate", selection_bias=f"{_HF_MLP}.expert_bias")
        return [*norms, *router, *moe.shared_experts(), *moe.experts()]
