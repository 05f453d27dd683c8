"""`MegatronModelBridge` as the field established it: methods that are given the Hugging Face model.

@MegatronModelBridge.register_bridge(source="MyForCausalLM", target=GPTModel)
class MyBridge(MegatronModelBridge):
    def provider_bridge(self, hf_pretrained): ...          # -> GPTModelProvider
    def mapping_registry(self): ...                        # -> MegatronMappingRegistry
"""

import dataclasses
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.conversion import hf_config as reader
from megatron.bridge.conversion import model_bridge
from megatron.bridge.conversion.table import WeightTable
from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.families.dense import SHARED_FIELDS
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from megatron.bridge.models.gpt_provider import GPTModelProvider

# What a changed model may say to its exported configuration: sizes.
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")


class MegatronModelBridge(model_bridge.MegatronModelBridge):
    """A model family; a subclass defines `provider_bridge(hf_pretrained)` and `mapping_registry()`."""

    # What `register_bridge(provider=)` named; None for `GPTModelProvider`.
    provider_class: ClassVar[type[Any] | None] = None

    def __init__(self, hf_config: "PretrainedConfig") -> None:
        super().__init__(hf_config)
        self.hf_pretrained = PreTrainedCausalLM(hf_config)
        fields = {**SHARED_FIELDS, "share_embeddings_and_output_weights": "tie_word_embeddings"}
        held = {field: name for field, name in fields.items() if getattr(hf_config, name, None) is not None}
        self._stated = held
        self.shared_fields = {field: held[field] for field in _SIZES if field in held}  # type: ignore[misc]

    def __init_subclass__(cls, **options: Any) -> None:
        """Let the subclass' methods be called as every family's are: without arguments, for our own types."""
        super().__init_subclass__(**options)
        if "provider_bridge" in vars(cls):
            cls.provider_bridge = _with_pretrained(cls.provider_bridge)  # type: ignore[method-assign]
        if "mapping_registry" in vars(cls):
            cls.mapping_registry = _with_table(cls.mapping_registry)  # type: ignore[method-assign]

    def provider_bridge(self, hf_pretrained: PreTrainedCausalLM | None = None) -> "GPTModelProvider":
        """A provider with every value that the configuration states under its usual name; the rest is the family's."""
        from megatron.bridge.models.gpt_provider import GPTModelProvider

        config = (hf_pretrained or self.hf_pretrained).config
        values: dict[str, Any] = {field: getattr(config, name) for field, name in self._stated.items()}
        rope = reader.rope(config)
        return (self.provider_class or GPTModelProvider)(
            **values,
            kv_channels=reader.head_dim(config),
            rotary_base=rope.theta,
            rotary_percent=rope.percent,
            rope_parameters=dict(rope.scaling) if rope.scaling else None,
        )

    @staticmethod
    def register_bridge(
        source: type | str, target: type | None = None, provider: type | None = None, model_type: str | None = None
    ) -> Callable[[type[model_bridge.MegatronModelBridge]], type[model_bridge.MegatronModelBridge]]:
        """Offer the decorated bridge for an architecture in this process.

        Args:
            source, target: as in `megatron.bridge.conversion.model_bridge`.
            provider: what the base class' `provider_bridge` makes; `GPTModelProvider` when None.
            model_type: accepted for compatibility; a family is found by its architecture alone.
        """
        register = model_bridge.MegatronModelBridge.register_bridge(source, target)

        def registered(bridge: type[Any]) -> type[Any]:
            bridge.provider_class = provider
            return register(bridge)

        return registered

    @staticmethod
    def dtype_from_hf(config: "PretrainedConfig") -> "torch.dtype":
        """dtype the weights were saved in."""
        return reader.dtype(config)

    @staticmethod
    def make_vocab_size_divisible_by(vocab_size: int) -> int:
        """The largest power of two up to 128 that divides the vocabulary, so that one rank needs no padding."""
        return next(size for size in (128, 64, 32, 16, 8, 4, 2, 1) if vocab_size % size == 0)


def _with_pretrained(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def provider_bridge(self: MegatronModelBridge, hf_pretrained: PreTrainedCausalLM | None = None) -> Any:
        provider = method(self, hf_pretrained or self.hf_pretrained)
        _refuse_unknown_attributes(provider, type(self).__name__)
        return provider

    return provider_bridge


def _refuse_unknown_attributes(provider: Any, family: str) -> None:
    """Refuse values that were set on the provider under a name that it does not know, and would be lost."""
    known = {field.name for field in dataclasses.fields(provider)}
    for name in vars(provider):
        if name not in known and not name.startswith("_"):
            raise BridgeError(
                f"{family}.provider_bridge sets {name!r}, which {type(provider).__name__} does not have"
                f"{did_you_mean(name, known)}"
            )


def _with_table(method: Callable[..., Any]) -> Callable[..., WeightTable]:
    @wraps(method)
    def mapping_registry(self: MegatronModelBridge) -> WeightTable:
        found = method(self)
        return found.table(self.provider_bridge()) if isinstance(found, MegatronMappingRegistry) else found

    return mapping_registry
