"""Command A+ of Cohere (2026)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.errors import BridgeError
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.cohere import Cohere2Bridge
from megatron.bridge.models.families.dense import shared_fields
from megatron.bridge.models.families.moe import MoEBridge
from megatron.bridge.models.routing import balancing, sigmoid_of_chosen, softmax_routing


class Cohere2MoeBridge(MoEBridge, Cohere2Bridge):
    """`Cohere2MoeForCausalLM`: attention and experts read the same norm; shared experts are added, or averaged."""

    shared_fields: ClassVar[dict[str, str]] = shared_fields(
        without=["ffn_hidden_size", "layernorm_epsilon"],
        moe_ffn_hidden_size="intermediate_size",
        num_moe_experts="num_experts",
    )

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        dense = [kind == "dense" for kind in config.mlp_layer_types]
        always_turned = config.prefix_dense_sliding_window_pattern == 1
        average = config.num_shared_experts and config.shared_expert_combination_strategy == "average"
        centred = config.rms_norm_eps is None
        return {
            **super().differences(),
            "normalization": "LayerNorm" if centred else "RMSNorm",
            "layernorm_epsilon": config.layer_norm_eps if centred else config.rms_norm_eps,
            "ffn_hidden_size": config.prefix_dense_intermediate_size or config.intermediate_size,
            "no_rope_freq": [
                int(window is None and not (always_turned and mlp))
                for window, mlp in zip(self.windows(), dense, strict=True)
            ],
            "moe_multiplier": 0.5 if average else 1.0,
        }

    def moe_layers(self) -> Sequence[bool]:
        return [kind == "sparse" for kind in self.hf_config.mlp_layer_types]

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        return {
            **self._routing(),
            **balancing(None),
            "moe_shared_expert_intermediate_size": config.intermediate_size * config.num_shared_experts or None,
        }

    def _routing(self) -> dict[str, Any]:
        config = self.hf_config
        if config.expert_selection_fn == "softmax":
            return softmax_routing(config.num_experts_per_tok, normalised=True)
        if config.expert_selection_fn == "sigmoid":
            return sigmoid_of_chosen(config.num_experts_per_tok, normalised=config.norm_topk_prob)
        raise BridgeError(f"config.json: expert_selection_fn={config.expert_selection_fn!r} is not known")

    def moe_rules(self) -> list[WeightRule]:
        shared = moe.shared_experts() if self.hf_config.num_shared_experts else []
        return [*moe.router(), *shared, *moe.experts()]
