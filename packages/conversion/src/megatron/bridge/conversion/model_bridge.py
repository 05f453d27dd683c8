"""`MegatronModelBridge`: what a model family says about itself, and where families are found."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.conversion.table import WeightTable
from megatron.bridge.conversion.transforms import Shape
from megatron.bridge.errors import BridgeError
from megatron.bridge.registry import Registry

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig
    from transformers import PretrainedConfig


class MegatronModelBridge(ABC):
    """One model family: the meaning of its Hugging Face configuration, and its weight table.

    A family is found by the architecture name in `config.json`, never by inheritance: a model that changes Llama under
    another name does not silently get Llama's table. It is offered by an entry point of the group
    `megatron.bridge.model_bridges` (name: the architecture), or in one process by `register_bridge`.

    Args:
        hf_config: the model's configuration.
    """

    # Megatron provider field <- Hugging Face field with the same value; read in both directions. Dots lead into
    # configurations within the configuration.
    shared_fields: ClassVar[Mapping[str, str]] = {}

    def __init__(self, hf_config: "PretrainedConfig") -> None:
        self.hf_config = hf_config
        # Names of the weights that the source holds, where there is one: what a configuration may leave open.
        self.weight_names: Callable[[], Collection[str] | None] = lambda: None

    @abstractmethod
    def provider_bridge(self) -> Any:
        """A provider (e.g. `GPTModelProvider`) of this model on Megatron-Core.

        Raises:
            BridgeError: the configuration asks for something the provider cannot express.
        """

    @abstractmethod
    def mapping_registry(self) -> WeightTable:
        """The weight table for this configuration: every weight of both sides, by rule."""

    def moe_layers(self) -> Sequence[bool] | None:
        """Per layer, whether its MLP is a mixture of experts; None where the family does not say."""
        return None

    def shared_values(self) -> dict[str, Any]:
        """The provider fields that are copied from the configuration.

        Raises:
            BridgeError: the configuration lacks a field.
        """
        absent = [name for name in self.shared_fields.values() if not hasattr(self.hf_config, name)]
        if absent:
            raise BridgeError(f"the configuration ({type(self.hf_config).__name__}) lacks {', '.join(absent)}")
        return {field: getattr(self.hf_config, name) for field, name in self.shared_fields.items()}

    def settled_changes(self) -> dict[str, Any]:
        """Configuration values that the source's files settle otherwise than the configuration states them."""
        return {}

    def further_changes(self, config: "TransformerConfig") -> dict[str, Any]:
        """Configuration values, beside the shared fields, in which a model that was built with `config` differs."""
        return {}

    # What the Megatron names of the language model begin with, where it is part of a larger one.
    language_prefix: ClassVar[str] = ""

    def tree_shapes(self) -> Mapping[str, Shape]:
        """Megatron names and shapes of what the table has whole sub-trees of."""
        return {}

    def probe_images(self, count: int, generator: "torch.Generator") -> "Mapping[str, torch.Tensor]":
        """So many random images as the model takes them for one row of tokens; empty for a model that sees none."""
        return {}

    def special_tokens(self) -> Sequence[int]:
        """Token ids that stand for something else than text: an image's first of all."""
        return ()

    def token_types(self, tokens: "torch.Tensor") -> "Mapping[str, torch.Tensor]":
        """What transformers' model wants to be told about the kinds of these tokens [batch, sequence]."""
        return {}

    @staticmethod
    def register_bridge(
        source: type | str, target: type | None = None
    ) -> Callable[[type["MegatronModelBridge"]], type["MegatronModelBridge"]]:
        """Offer the decorated bridge for an architecture in this process.

        Args:
            source: the transformers model class, or its name as `config.json` spells it.
            target: the Megatron-Core model class that the provider builds; checked to be a class, for readers.
        """
        if target is not None and not isinstance(target, type):
            raise BridgeError(f"register_bridge: target must be a Megatron-Core model class, not {target!r}")
        name = source if isinstance(source, str) else source.__name__

        def register(bridge: type[MegatronModelBridge]) -> type[MegatronModelBridge]:
            MODEL_BRIDGES.register(name, bridge)
            return bridge

        return register


MODEL_BRIDGES: Registry[type[MegatronModelBridge]] = Registry(
    "megatron.bridge.model_bridges", MegatronModelBridge, "model bridge"
)
