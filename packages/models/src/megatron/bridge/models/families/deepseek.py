"""DeepSeek-V2 (arXiv:2405.04434), DeepSeek-V3 (arXiv:2412.19437) and models of the same layout."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.dense import shared_fields
from megatron.bridge.models.families.latent import LATENT_FIELDS, LatentAttentionBridge
from megatron.bridge.models.families.moe import after_dense_prefix
from megatron.bridge.models.families.prediction import PredictionBridge
from megatron.bridge.models.families.sigmoid_moe import SigmoidMoEBridge
from megatron.bridge.models.routing import group_fields, softmax_routing


class DeepseekV3Bridge(PredictionBridge, LatentAttentionBridge, SigmoidMoEBridge):
    """`DeepseekV3ForCausalLM` (Kimi-K2 too): a dense prefix, then experts chosen by sigmoid scores and a bias."""

    shared_fields: ClassVar[Mapping[str, str]] = shared_fields(
        without=["num_query_groups"],
        **LATENT_FIELDS,
        moe_ffn_hidden_size="moe_intermediate_size",
        num_moe_experts="n_routed_experts",
    )

    def moe_layers(self) -> Sequence[bool]:
        return after_dense_prefix(self)


class DeepseekV2Bridge(DeepseekV3Bridge):
    """`DeepseekV2ForCausalLM`: experts chosen by softmax; groups of experts count as much as their best one."""

    selection_bias = None

    def interleaved(self) -> bool:
        return True

    def routing(self) -> dict[str, Any]:
        config = self.hf_config
        fields = softmax_routing(config.num_experts_per_tok, normalised=False, scaling=config.routed_scaling_factor)
        if config.topk_method == "greedy":
            return fields
        if config.topk_method == "group_limited_greedy":
            topk = config.num_experts_per_tok
            return fields | group_fields(topk, config.n_group, config.topk_group, ranking=1)
        raise BridgeError(f"config.json: topk_method {config.topk_method!r} is not supported in this family")


class Glm4MoeLiteBridge(DeepseekV3Bridge):
    """`Glm4MoeLiteForCausalLM`: DeepSeek-V3's layers, listed one by one."""

    def moe_layers(self) -> Sequence[bool]:
        return [kind == "sparse" for kind in self.hf_config.mlp_layer_types]


class YoutuBridge(LatentAttentionBridge):
    """`YoutuForCausalLM`: multi-latent attention in a dense decoder."""
