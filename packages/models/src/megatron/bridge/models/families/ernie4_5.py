"""ERNIE 4.5 dense models of Baidu (2025)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.models.families.dense import DenseBridge, shared_fields


class Ernie45Bridge(DenseBridge):
    """`Ernie4_5ForCausalLM`: one switch for all biases; neighbouring channels turn together."""

    shared_fields = shared_fields(without=["attention_dropout"])

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.use_bias)

    output_bias = mlp_bias = qkv_bias

    def differences(self) -> Mapping[str, Any]:
        return {"rotary_interleaved": True}
