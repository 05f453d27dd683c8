"""Aria's language model (`AriaTextForCausalLM`, arXiv:2410.05993): Llama's layout with mixtures of experts."""

from typing import Any, ClassVar

from megatron.bridge.conversion.shards import GATED_COLUMN, ROW, Expert
from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.conversion.transforms import Transposed
from megatron.bridge.errors import BridgeError
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.dense import SHARED_FIELDS
from megatron.bridge.models.families.moe import MoEBridge
from megatron.bridge.models.routing import softmax_routing

_HF = "model.layers.{l}.mlp"
_EXPERT = "decoder.layers.{l}.mlp.experts.experts.{e}"


class AriaTextBridge(MoEBridge):
    """Softmax over the chosen experts; `moe_num_shared_experts` more see every token, as one gated MLP."""

    shared_fields: ClassVar[dict[str, str]] = {
        **SHARED_FIELDS,
        "moe_ffn_hidden_size": "intermediate_size",
        "num_moe_experts": "moe_num_experts",
    }

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    def output_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        if config.mlp_bias or config.hidden_act != "silu":
            # transformers gives only the shared experts these, and Megatron-Core has one setting for all.
            raise BridgeError(
                f"config.json: mlp_bias={config.mlp_bias}, hidden_act={config.hidden_act!r} are for Aria's shared "
                "experts alone; mlp_bias=False and 'silu', as in the published models, convert"
            )
        return {
            **softmax_routing(config.moe_topk, normalised=True),
            "moe_router_load_balancing_type": "none",
            "moe_shared_expert_intermediate_size": config.intermediate_size * config.moe_num_shared_experts,
        }

    def moe_rules(self) -> list[WeightRule]:
        """Experts are stacked as `[experts, hidden, 2 x ffn]` and `[experts, ffn, hidden]`."""
        fc1, fc2 = (f"{_HF}.experts.{name}.weight[{{e}}]" for name in ("fc1", "fc2"))
        return [
            *moe.moe_norm(),
            *moe.router(f"{_HF}.router"),
            WeightRule(f"{_EXPERT}.linear_fc1.weight", fc1, Transposed(), Expert(GATED_COLUMN)),
            WeightRule(f"{_EXPERT}.linear_fc2.weight", fc2, Transposed(), Expert(ROW)),
            *moe.shared_experts(),
        ]
