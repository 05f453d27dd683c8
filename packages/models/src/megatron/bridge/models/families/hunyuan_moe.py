"""Hunyuan-A13B of Tencent (2025)."""

from typing import Any, ClassVar

from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.errors import BridgeError
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.hunyuan import HunYuanDenseV1Bridge
from megatron.bridge.models.families.moe import MoEBridge
from megatron.bridge.models.routing import balancing, softmax_routing

_HF_MLP = "model.layers.{l}.mlp"


class HunYuanMoEV1Bridge(MoEBridge, HunYuanDenseV1Bridge):
    """`HunYuanMoEV1ForCausalLM`: experts in every layer, and a shared one as large as one of them."""

    shared_fields: ClassVar[dict[str, str]] = {**MoEBridge.shared_fields, "moe_ffn_hidden_size": "intermediate_size"}

    def moe_fields(self) -> dict[str, Any]:
        return {
            **softmax_routing(self._in_all_layers("moe_topk"), normalised=True),
            **balancing(None),
            "moe_router_dtype": "fp32",
            "num_moe_experts": self._in_all_layers("num_experts"),
            "moe_shared_expert_intermediate_size": self.hf_config.intermediate_size,
        }

    def _in_all_layers(self, name: str) -> int:
        """A value that the configuration states once, or once per layer."""
        stated = getattr(self.hf_config, name)
        values = {stated} if isinstance(stated, int) else set(stated)
        if len(values) != 1:
            raise BridgeError(
                f"config.json: {name} differs between layers ({sorted(values)}), and Megatron-Core has one for all"
            )
        return int(values.pop())

    def moe_rules(self) -> list[WeightRule]:
        shared = moe.shared_experts(f"{_HF_MLP}.shared_mlp")
        return [*moe.moe_norm(), *moe.router(f"{_HF_MLP}.gate.wg"), *shared, *moe.experts()]
