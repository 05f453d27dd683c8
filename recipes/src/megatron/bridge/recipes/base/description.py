"""A recipe before it is built: plain values, each with its source. Torch-free; `building.build` builds it.

Changes are functions that take a description and give another, so they can be written one after the other:
`shrunk(on(description, "64xH100"))`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron.bridge.recipes.base.stated import Stated, stated

type Task = Literal["pretrain", "finetune"]


@dataclass(frozen=True)
class Description:
    """What a run is made from.

    Attributes:
        task: `pretrain` starts from random weights, `finetune` from given ones.
        hf_config: the model, as its `config.json` says it.
        home: where that `config.json` is from.
        settings: dotted key of a `ConfigContainer` -> value; `peft` is the name of a method, or None.
    """

    task: Task
    hf_config: Mapping[str, Any]
    home: str
    settings: Mapping[str, Stated]

    def but(self, source: str, values: Mapping[str, Any]) -> "Description":
        """The same with other settings, of one source."""
        return self.having(stated(source, values))

    def having(self, settings: Mapping[str, Stated]) -> "Description":
        """The same with other settings."""
        return dataclasses.replace(self, settings={**self.settings, **settings})

    def without(self, *keys: str) -> "Description":
        """The same without some settings, which then have their defaults."""
        kept = {key: value for key, value in self.settings.items() if key not in keys}
        return dataclasses.replace(self, settings=kept)

    def value(self, key: str, default: Any = None) -> Any:
        """What a setting is."""
        return self.settings[key].value if key in self.settings else default

    @property
    def values(self) -> dict[str, Stated]:
        """Everything, the model's configuration under `hf_config.`."""
        source = f"{self.home}, config.json"
        model = {f"hf_config.{key}": Stated(value, source) for key, value in self.hf_config.items()}
        return {**model, **self.settings}
