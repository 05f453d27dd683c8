"""A whole command line of Megatron-LM as sections of our configuration."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from megatron.bridge.training.migration.arguments import Given, read, rule_of
from megatron.bridge.training.migration.model_together import MODEL_TOGETHER
from megatron.bridge.training.migration.run_together import RUN_TOGETHER
from megatron.bridge.training.migration.translating import Translating

RECIPE = "megatron_lm"


@dataclass(frozen=True)
class Translation:
    """What a command line came to.

    Attributes:
        values: dotted key of a `ConfigContainer` -> value; all else is as Megatron-LM has it without being told, which
            the recipe `megatron_lm` knows.
        notes: what was left out and why, and what changes.
        run_folder: where the run goes on by itself; None where nothing says so.
    """

    values: dict[str, Any]
    notes: list[str]
    run_folder: str | None = None

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """The values as YAML has them."""
        found: dict[str, dict[str, Any]] = {}
        for key, value in self.values.items():
            section, _, field = key.partition(".")
            found.setdefault(section, {})[field] = value
        return dict(sorted(found.items()))

    def to_yaml(self) -> str:
        """A file for `--config`, with the notes as comments."""
        head = [f"For `--recipe {RECIPE}`, translated from Megatron-LM's arguments.", *self.notes]
        comments = "".join(f"# {line}\n" for line in head)
        return comments + yaml.safe_dump(self.sections, sort_keys=False)


def translate(words: Iterable[str], *, world_size: int | None = None, tokenizer: str | None = None) -> Translation:
    """What Megatron-LM's arguments mean here.

    Args:
        words: of its command line, from behind the script's name on.
        world_size: number of ranks, which decides about the batch where `--global-batch-size` is absent.
        tokenizer: Hugging Face folder that takes the place of a tokenizer that is not Hugging Face's.

    Raises:
        ConfigError: everything that is unknown, refused, missing or contradictory.
    """
    from megatron.bridge.training.validation import ConfigError, report

    given, problems = read(words)
    state = Translating({each.name: each.words for each in given}, world_size, tokenizer, problems=problems)
    left_out: dict[str, list[str]] = {}
    if not problems:
        for each in given:
            _translate(each, state, left_out)
        for combine in (*MODEL_TOGETHER, *RUN_TOGETHER):
            combine(state)
    if state.problems:
        raise ConfigError(report("Megatron-LM's arguments cannot be translated", state.problems))
    notes = [f"left out, {why}: {' '.join(names)}" for why, names in left_out.items()]
    return Translation(dict(sorted(state.values.items())), [*state.notes, *notes], state.run_folder)


def _translate(given: Given, state: Translating, left_out: dict[str, list[str]]) -> None:
    """An argument that means something by itself."""
    rule = rule_of(given.name)
    assert rule is not None
    if rule.left_out:
        names = left_out.setdefault(rule.left_out, [])
        names += [f"--{given.name}"] if f"--{given.name}" not in names else []
    if not rule.fields:
        return
    try:
        value = (
            rule.value if rule.read is None else rule.read(given.words[0] if rule.arity == "one" else list(given.words))
        )
    except ValueError as error:
        state.problems.append(f"--{given.name}: {error}")
    else:
        state.values |= dict.fromkeys(rule.fields, value)
