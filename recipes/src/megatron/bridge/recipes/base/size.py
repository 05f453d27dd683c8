"""A published model as data: its `config.json`, how many parameters it has, and how it was trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.bridge.recipes.base.stated import Stated


@dataclass(frozen=True)
class Size:
    """One size of a model family.

    Attributes:
        title: as people call it.
        home: its repository on the Hugging Face hub.
        parameters: how many it has, as published (`8.03B`); prediction layers are not counted.
        counted_by: where that is published.
        hf_config: what decides about the model in its `config.json`, spelled as transformers 5 does.
        pretraining: what is published of its training: dotted key of a configuration -> value.
        adapted_modules: what adapters bind to, where that is not attention and MLP.
    """

    title: str
    home: str
    parameters: str
    counted_by: str
    hf_config: Mapping[str, Any]
    pretraining: Mapping[str, Stated] = field(default_factory=dict)
    adapted_modules: tuple[str, ...] | None = None

    @property
    def architecture(self) -> str:
        """The class in `config.json`."""
        return str(self.hf_config["architectures"][0])

    @property
    def num_parameters(self) -> float:
        """`parameters` as a number."""
        return float(self.parameters[:-1]) * {"M": 1e6, "B": 1e9}[self.parameters[-1]]

    @property
    def positions(self) -> int:
        """Longest sequence that the model was made for, in tokens."""
        text = self.hf_config.get("text_config", self.hf_config)
        return int(text.get("max_position_embeddings") or text.get("n_positions") or 1 << 20)


def decoder(hidden: int, ffn: int, layers: int, heads: int, groups: int, **more: Any) -> dict[str, Any]:
    """The widths of a decoder under the names of `config.json`."""
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        **more,
    }


def rope(theta: float, kind: str = "default", **scaling: Any) -> dict[str, Any]:
    """Rotary settings, as transformers 5 spells them."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}
