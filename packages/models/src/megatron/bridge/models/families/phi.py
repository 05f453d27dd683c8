"""Phi-1, Phi-1.5 and Phi-2 (arXiv:2306.11644), Phi-3 and Phi-4 (arXiv:2404.14219, arXiv:2412.08905) of Microsoft."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.dense import BiasedBridge, DenseBridge, shared_fields
from megatron.bridge.models.fragments import HFNames


class PhiBridge(BiasedBridge):
    """`PhiForCausalLM`: attention and MLP read the same LayerNorm; biases everywhere, in the output layer too."""

    shared_fields = shared_fields(layernorm_epsilon="layer_norm_eps", hidden_dropout="resid_pdrop")
    names = HFNames(
        final_norm="model.final_layernorm", attention_output="self_attn.dense", fc1=("mlp.fc1",), fc2="mlp.fc2"
    )

    def differences(self) -> Mapping[str, Any]:
        if self.hf_config.qk_layernorm:
            raise BridgeError("config.json: qk_layernorm=True is not supported in PhiForCausalLM")
        return {"parallel_block": True, "shared_pre_norm": True, "output_bias": True}


class Phi3Bridge(DenseBridge):
    """`Phi3ForCausalLM`: q, k and v in one weight, gate and up projection in another."""

    names = HFNames(qkv=("self_attn.qkv_proj",), fc1=("mlp.gate_up_proj",))

    def windows(self) -> Sequence[int | None]:
        return [self.hf_config.sliding_window] * self.hf_config.num_hidden_layers
