"""A translation on its way: what was given, what it came to, and what stands against it."""

from dataclasses import dataclass, field
from typing import Any

from megatron.bridge.training.migration.rules import number


@dataclass
class Translating:
    """A translation on its way.

    Attributes:
        words: by argument, what followed it; of one given twice the last, as in Megatron-LM.
        world_size: ranks, where that is known.
        tokenizer: Hugging Face folder that takes the tokenizer's place.
        values: dotted key -> value.
        notes: for people.
        problems: why it cannot be done.
        run_folder: where the run goes on by itself, as with `--load` and `--save` of one folder.
    """

    words: dict[str, tuple[str, ...]]
    world_size: int | None = None
    tokenizer: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    run_folder: str | None = None

    def has(self, *names: str) -> bool:
        """Whether one of these was given."""
        return any(name in self.words for name in names)

    def word(self, name: str, default: str = "") -> str:
        """What followed an argument."""
        return self.words.get(name, (default,))[0]

    def number(self, name: str, default: Any = None) -> Any:
        """What followed an argument, as a number."""
        return number(self.words[name][0]) if name in self.words else default
