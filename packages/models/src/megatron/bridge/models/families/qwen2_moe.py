"""Qwen1.5-MoE and Qwen2-57B-A14B (arXiv:2407.10671)."""

from collections.abc import Sequence
from typing import Any

from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.moe import MoEBridge
from megatron.bridge.models.routing import balancing, softmax_routing


class Qwen2MoeBridge(MoEBridge):
    """`Qwen2MoeForCausalLM`: a shared expert that is scaled per token stands beside the routed ones."""

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.qkv_bias)

    def windows(self) -> Sequence[int | None]:
        config = self.hf_config
        return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]

    def moe_layers(self) -> Sequence[bool]:
        config = self.hf_config
        step, dense = config.decoder_sparse_step, set(config.mlp_only_layers or ())
        return [layer not in dense and (layer + 1) % step == 0 for layer in range(config.num_hidden_layers)]

    def normalised(self) -> bool:
        """Whether the weights of a token's experts sum to one."""
        return bool(self.hf_config.norm_topk_prob)

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        return {
            **softmax_routing(config.num_experts_per_tok, normalised=self.normalised()),
            **balancing(config.router_aux_loss_coef),
            "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
            "moe_shared_expert_gate": True,
        }

    def moe_rules(self) -> list[WeightRule]:
        mlp = "model.layers.{l}.mlp"
        shared = moe.shared_experts(f"{mlp}.shared_expert", scale=f"{mlp}.shared_expert_gate.weight")
        return [*moe.moe_norm(), *moe.router(), *shared, *moe.experts()]
