"""Mixtral 8x7B and 8x22B (arXiv:2401.04088)."""

from collections.abc import Sequence
from typing import Any, ClassVar

from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.dense import SHARED_FIELDS
from megatron.bridge.models.families.moe import MoEBridge
from megatron.bridge.models.routing import balancing, softmax_routing

HF_MOE = "model.layers.{l}.block_sparse_moe"


class MixtralBridge(MoEBridge):
    """`MixtralForCausalLM`: experts in every layer, the chosen ones' weights normalised."""

    shared_fields: ClassVar[dict[str, str]] = {
        **SHARED_FIELDS,
        "moe_ffn_hidden_size": "intermediate_size",
        "num_moe_experts": "num_local_experts",
    }

    selection_bias: ClassVar[str | None] = None

    def windows(self) -> Sequence[int | None]:
        return [self.hf_config.sliding_window] * self.hf_config.num_hidden_layers

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        return {
            **softmax_routing(config.num_experts_per_tok, normalised=True),
            **balancing(config.router_aux_loss_coef),
            "moe_input_jitter_eps": config.router_jitter_noise or None,
        }

    def moe_rules(self) -> list[WeightRule]:
        return [
            *moe.moe_norm(kinds=self.norm_kinds),
            *moe.router(f"{HF_MOE}.gate", selection_bias=self.selection_bias),
            *moe.experts(f"{HF_MOE}.experts.{{e}}", gate="w1", up="w3", down="w2"),
        ]
