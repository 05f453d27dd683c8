"""The text model of Aria of Rhymes AI (arXiv:2410.05993)."""

from typing import Any, ClassVar

from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.errors import BridgeError
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.dense import shared_fields
from megatron.bridge.models.families.llama import LlamaBridge
from megatron.bridge.models.families.moe import MoEBridge
from megatron.bridge.models.routing import balancing, softmax_routing

_HF_MLP = "model.layers.{l}.mlp"


class AriaTextBridge(MoEBridge, LlamaBridge):
    """`AriaTextForCausalLM`: Llama with experts in every layer, which its files hold stacked, and shared ones."""

    shared_fields: ClassVar[dict[str, str]] = shared_fields(
        moe_ffn_hidden_size="intermediate_size", num_moe_experts="moe_num_experts"
    )

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        if config.mlp_bias or config.hidden_act != "silu":
            raise BridgeError(
                f"config.json: mlp_bias={config.mlp_bias}, hidden_act={config.hidden_act!r} would hold for the shared "
                "experts only; Megatron-Core has no biases there, and one activation"
            )
        return {
            **softmax_routing(config.moe_topk, normalised=True),
            **balancing(None),
            "moe_shared_expert_intermediate_size": config.intermediate_size * config.moe_num_shared_experts,
        }

    def moe_rules(self) -> list[WeightRule]:
        fc1, fc2 = (f"{_HF_MLP}.experts.{layer}.weight" for layer in ("fc1", "fc2"))
        stacked = moe.stacked_experts(fc1, fc2, transposed=True)
        return [*moe.moe_norm(), *moe.router(f"{_HF_MLP}.router"), *moe.shared_experts(), *stacked]
