"""Decoders of the Llama layout with mixtures of experts in place of some or all MLPs."""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.conversion.table import WeightRule, WeightTable
from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.dense import SHARED_FIELDS, DenseBridge

if TYPE_CHECKING:
    from megatron.bridge.models.gpt_provider import GPTModelProvider

_DENSE_MLP = "decoder.layers.{l}.mlp."


class MoEBridge(DenseBridge):
    """A dense decoder, but for its mixtures of experts; subclasses say where they are and how tokens are routed."""

    # Expert counts and sizes go by other names in every family.
    shared_fields: ClassVar[Mapping[str, str]] = {
        **SHARED_FIELDS,
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "num_moe_experts": "num_experts",
    }

    def moe_layers(self) -> Sequence[bool]:
        """Per layer, whether its MLP is a mixture of experts."""
        return [True] * self.hf_config.num_hidden_layers

    @abstractmethod
    def moe_fields(self) -> dict[str, Any]:
        """Provider fields of routing, shared experts and load balancing."""

    @abstractmethod
    def moe_rules(self) -> list[WeightRule]:
        """The weights of a layer's mixture of experts, its norm included."""

    def provider_bridge(self) -> "GPTModelProvider":
        layers = self.moe_layers()
        if not any(layers):
            raise BridgeError(
                f"config.json: no layer of this {type(self.hf_config).__name__} is a mixture of experts; "
                "convert it as the dense model that it is"
            )
        return (
            super()
            .provider_bridge()
            .replace(
                # One kind of layer in all places lets checkpoints stack the layers.
                moe_layer_freq=1 if all(layers) else [int(mixture) for mixture in layers],
                # Every token reaches the experts it was routed to, whatever their load.
                moe_expert_capacity_factor=None,
                moe_token_dispatcher_type="alltoall",
                **self.moe_fields(),
            )
        )

    def mapping_registry(self) -> WeightTable:
        table = super().mapping_registry()
        all_moe = all(self.moe_layers())
        others = [rule for rule in table.rules if not (all_moe and rule.megatron.startswith(_DENSE_MLP))]
        return dataclasses.replace(table, rules=(*others, *self.moe_rules()))


def after_dense_prefix(bridge: MegatronModelBridge) -> list[bool]:
    """The mixtures of a model whose first `first_k_dense_replace` layers are dense."""
    config = bridge.hf_config
    return [layer >= (config.first_k_dense_replace or 0) for layer in range(config.num_hidden_layers)]
