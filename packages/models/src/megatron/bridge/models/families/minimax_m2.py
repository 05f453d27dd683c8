"""MiniMax-M2 (2025)."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.bridge.models.families.mixtral import HF_MOE, MixtralBridge
from megatron.bridge.models.routing import balancing, sigmoid_routing


class MiniMaxM2Bridge(MixtralBridge):
    """`MiniMaxM2ForCausalLM`: Mixtral's names, sigmoid routing, norms over all queries and all keys of a token.

    Layers for multi-token prediction have no rules: a checkpoint that holds them is refused, naming them.
    """

    selection_bias = f"{HF_MOE}.e_score_correction_bias"

    def windows(self) -> Sequence[int | None]:
        return [None] * self.hf_config.num_hidden_layers

    def qk_norm(self) -> bool:
        return True

    def differences(self) -> Mapping[str, Any]:
        return {"qk_norm_over": "projection"}

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        return {
            **sigmoid_routing(config.num_experts_per_tok, normalised=True, scaling=1.0),
            **balancing(config.router_aux_loss_coef),
            "moe_input_jitter_eps": config.router_jitter_noise or None,
        }
