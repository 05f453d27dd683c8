"""Nemotron-4 and Minitron of NVIDIA (arXiv:2402.16819, arXiv:2407.14679), and Jais 2 of MBZUAI and G42."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.models.families.dense import shared_fields
from megatron.bridge.models.families.llama import LlamaBridge
from megatron.bridge.models.fragments import WEIGHT_AND_BIAS, HFNames


class Jais2Bridge(LlamaBridge):
    """`Jais2ForCausalLM`: LayerNorms, and an MLP without a gate."""

    shared_fields = shared_fields(layernorm_epsilon="layer_norm_eps")
    names = HFNames(fc1=("mlp.up_proj",))
    normalization = "LayerNorm"
    norm_kinds = WEIGHT_AND_BIAS
    gated = False


class NemotronBridge(Jais2Bridge):
    """`NemotronForCausalLM`: the same with partial RoPE, and norms by 1 + weight."""

    shared_fields = shared_fields(layernorm_epsilon="norm_eps")

    def differences(self) -> Mapping[str, Any]:
        return {"layernorm_zero_centered_gamma": True}
