"""Apertus of the Swiss AI Initiative (arXiv:2509.14233)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.conversion.table import WeightRule, WeightTable
from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.activations import gelu_tanh
from megatron.bridge.models.families.llama import LlamaBridge
from megatron.bridge.models.fragments import HFNames


class ApertusBridge(LlamaBridge):
    """`ApertusForCausalLM`: Llama with norms on queries and keys, and an MLP whose one activation is trained."""

    names = HFNames(input_norm="attention_layernorm", mlp_norm="feedforward_layernorm", fc1=("mlp.up_proj",))
    gated = False

    def mlp_bias(self) -> bool:
        return False

    def qk_norm(self) -> bool:
        return True

    def activation_function(self) -> Any:
        """A stand-in that the trained activation replaces."""
        if self.hf_config.hidden_act != "xielu":
            raise BridgeError(
                f"config.json: hidden_act {self.hf_config.hidden_act!r}: ApertusForCausalLM needs 'xielu'"
            )
        return gelu_tanh

    def differences(self) -> Mapping[str, Any]:
        return {"trained_activation": "xielu"}

    def mapping_registry(self) -> WeightTable:
        table = super().mapping_registry()
        own, hf = "decoder.layers.{l}.mlp.activation_func", "model.layers.{l}.mlp.act_fn"
        activation = [WeightRule(f"{own}.{name}", f"{hf}.{name}") for name in ("alpha_p", "alpha_n", "beta", "eps")]
        return WeightTable.of(table.rules, activation, tied=table.tied, ignored=table.ignored)
