"""Ministral (8B, 2024) and Ministral 3 (2025) of Mistral AI."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.dense import DenseBridge
from megatron.bridge.models.families.mistral import MistralBridge


class MinistralBridge(DenseBridge):
    """`MinistralForCausalLM`: the Llama layout without biases; `layer_types` say which layers have a window."""


class Ministral3Bridge(MistralBridge):
    """`Ministral3ForCausalLM`: Mistral with queries that grow slowly with their position."""

    def differences(self) -> Mapping[str, Any]:
        return query_temperature(self.hf_config)


def query_temperature(config: Any) -> dict[str, Any]:
    """Provider fields of queries that grow slowly with their position.

    Raises:
        BridgeError: the configuration does not say how.
    """
    rope = config.rope_parameters
    names = ("llama_4_scaling_beta", "original_max_position_embeddings")
    absent = [name for name in names if rope.get(name) is None]
    if absent:
        raise BridgeError(f"config.json: rope_parameters lack {', '.join(absent)}, which scale the queries")
    beta, positions = (rope[name] for name in names)
    return {"query_temperature": (float(beta), int(positions))}
