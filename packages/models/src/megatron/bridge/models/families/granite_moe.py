"""Granite mixtures of experts of IBM (2024)."""

from typing import Any, ClassVar

from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.dense import shared_fields
from megatron.bridge.models.families.granite import GraniteBridge, GraniteSWABridge
from megatron.bridge.models.families.moe import MoEBridge
from megatron.bridge.models.routing import balancing, softmax_routing

_HF_MOE, _HF_SHARED = "model.layers.{l}.block_sparse_moe", "model.layers.{l}.shared_mlp"


class GraniteMoeBridge(MoEBridge, GraniteBridge):
    """`GraniteMoeForCausalLM`: Granite with experts in every layer, which its files hold stacked."""

    shared_fields: ClassVar[dict[str, str]] = shared_fields(
        moe_ffn_hidden_size="intermediate_size", num_moe_experts="num_local_experts"
    )

    # Below the mixture of experts: the router, and the stacked weights.
    router: ClassVar[str] = "router.layer"
    gate_up: ClassVar[str] = "input_linear.weight"
    down: ClassVar[str] = "output_linear.weight"

    def mlp_bias(self) -> bool:
        return False

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        return {
            **softmax_routing(config.num_experts_per_tok, normalised=True),
            **balancing(config.router_aux_loss_coef),
        }

    def moe_rules(self) -> list[WeightRule]:
        stacked = moe.stacked_experts(f"{_HF_MOE}.{self.gate_up}", f"{_HF_MOE}.{self.down}")
        return [*moe.moe_norm(), *moe.router(f"{_HF_MOE}.{self.router}"), *stacked]


class GraniteMoeSharedBridge(GraniteMoeBridge):
    """`GraniteMoeSharedForCausalLM`: with shared experts, unless their size is 0."""

    def moe_fields(self) -> dict[str, Any]:
        size = self.hf_config.shared_intermediate_size
        return {**super().moe_fields(), "moe_shared_expert_intermediate_size": size or None}

    def moe_rules(self) -> list[WeightRule]:
        shared = moe.shared_experts(_HF_SHARED, fc1=("input_linear",), fc2="output_linear")
        return [*super().moe_rules(), *(shared if self.hf_config.shared_intermediate_size else [])]


class GraniteMoeSWABridge(GraniteMoeSharedBridge, GraniteSWABridge):
    """`GraniteMoeSWAForCausalLM`: with the windows, sinks and rotary bases of `GraniteSWAForCausalLM`."""

    router, gate_up, down = "router", "experts.gate_up_proj", "experts.down_proj"
