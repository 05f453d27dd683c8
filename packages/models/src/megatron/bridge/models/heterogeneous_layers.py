"""What a decoder says whose layers differ in size, share keys and values, or read inputs of their own. Data only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class HeterogeneousLayers:
    """How the layers of one decoder differ. Layers count from 0.

    Args:
        sizes: per layer, the `TransformerConfig` fields in which it differs from the model's (`kv_channels`,
            `num_query_groups`, `ffn_hidden_size`, ...).
        key_value_sources: per layer, the earlier layer whose keys and values it attends to, having none of its own;
            None: its own.
        value_is_key: per layer, whether values are the keys before their norm, instead of a projection.
        input_size: channels of an input that every layer has beside the hidden states, made from the tokens (0: none).
        input_vocab_size: tokens that the table of these inputs has.
        experts_beside_mlp: a mixture of experts stands beside the MLP, both with norms before and behind of their own.
    """

    sizes: Sequence[Mapping[str, int]]
    key_value_sources: Sequence[int | None]
    value_is_key: Sequence[bool]
    input_size: int = 0
    input_vocab_size: int = 0
    experts_beside_mlp: bool = False

    def size(self, layer: int, field: str, config: Any) -> int:
        """A field of `layer`'s config, of which `config` is the model's."""
        return int(self.sizes[layer].get(field, getattr(config, field)))

    def sources_across(self, layer: int) -> list[int]:
        """The layers before `layer` whose keys and values it or later ones attend to."""
        return sorted({source for source in self.key_value_sources[layer:] if source is not None and source < layer})

    @property
    def alike(self) -> bool:
        """Whether all layers have the same weights after all."""
        weights = list(zip(map(dict, self.sizes), self.key_value_sources, self.value_is_key, strict=True))
        return all(each == weights[0] for each in weights)

    @property
    def hands_on(self) -> bool:
        """Whether layers need more than the hidden states of the one before."""
        return bool(self.input_size) or any(source is not None for source in self.key_value_sources)
