"""gpt-oss of OpenAI (arXiv:2508.10925)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.errors import BridgeError
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.activations import activation
from megatron.bridge.models.families.dense import shared_fields
from megatron.bridge.models.families.moe import MoEBridge
from megatron.bridge.models.routing import balancing, softmax_routing

_HF_MLP = "model.layers.{l}.mlp"


class GptOssBridge(MoEBridge):
    """`GptOssForCausalLM`: attention sinks, biases everywhere, and experts with a clamped gate."""

    shared_fields: ClassVar[dict[str, str]] = shared_fields(
        moe_ffn_hidden_size="intermediate_size", num_moe_experts="num_local_experts"
    )

    def qkv_bias(self) -> bool:
        return True

    output_bias = mlp_bias = qkv_bias

    def activation_function(self) -> Any:
        if self.hf_config.swiglu_alpha != 1.702:
            raise BridgeError(f"config.json: swiglu_alpha={self.hf_config.swiglu_alpha} is not supported, 1.702 is")
        return activation("quick_gelu")

    def differences(self) -> Mapping[str, Any]:
        if not self.hf_config.attention_bias:
            raise BridgeError("config.json: attention_bias=False; Megatron-Core has biases everywhere or in no expert")
        return {
            "add_bias_linear": True,
            "softmax_type": "learnable",
            "glu_linear_offset": 1.0,
            "activation_func_clamp_value": self.hf_config.swiglu_limit,
        }

    def moe_fields(self) -> dict[str, Any]:
        config = self.hf_config
        return {
            **softmax_routing(config.num_experts_per_tok, normalised=True),
            **balancing(config.router_aux_loss_coef),
            # Other layer specs than `torch` have biases only where tensor parallelism does not divide the experts.
            "expert_tensor_parallel_size": 1,
        }

    def moe_rules(self) -> list[WeightRule]:
        experts = f"{_HF_MLP}.experts"
        return [
            *moe.moe_norm(),
            *moe.router(f"{_HF_MLP}.router"),
            WeightRule("decoder.layers.{l}.mlp.router.bias", f"{_HF_MLP}.router.bias"),
            *moe.stacked_experts(
                f"{experts}.gate_up_proj", f"{experts}.down_proj", transposed=True, interleaved=True, bias="_bias"
            ),
        ]
