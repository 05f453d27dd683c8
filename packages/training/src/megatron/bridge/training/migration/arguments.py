"""All arguments of Megatron-LM that are known, and how a command line is read by them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron.bridge.errors import did_you_mean
from megatron.bridge.training.migration.foreign_arguments import FOREIGN, of_a_family
from megatron.bridge.training.migration.model_arguments import MODEL
from megatron.bridge.training.migration.rules import Rule, Table, left_out, moved
from megatron.bridge.training.migration.run_arguments import RUN

# Of earlier versions of Megatron-LM (before megatron-core 0.19), whose scripts are still about.
OLDER: Table = {
    **moved({"layernorm-epsilon": "model.layernorm_epsilon"}),
    **left_out(
        "it has no effect in Megatron-LM any more",
        """
        log-batch-size-to-tensorboard log-learning-rate-to-tensorboard no-async-tensor-model-parallel-allreduce
        no-contiguous-buffers-in-local-ddp no-scatter-gather-tensors-in-pipeline no-delay-grad-reduce
        moe-extended-tp
        """,
    ),
}
ARGUMENTS: Table = {**OLDER, **FOREIGN, **MODEL, **RUN}


@dataclass(frozen=True)
class Given:
    """An argument as it was given.

    Attributes:
        name: without the hyphens before it.
        words: that follow it.
    """

    name: str
    words: tuple[str, ...]


def read(words: Iterable[str]) -> tuple[list[Given], list[str]]:
    """The arguments of a command line, and what is wrong with their names and numbers of words."""
    given: list[Given] = []
    problems: list[str] = []
    for group in _groups(words):
        found = _given(group)
        given.append(found)
        problems += _problems(found)
    return given, problems


def rule_of(name: str) -> Rule | None:
    """What becomes of an argument; None where nobody knows it."""
    return ARGUMENTS.get(name) or of_a_family(name)


def meaning(name: str) -> str:
    """What becomes of an argument, for people."""
    rule = rule_of(name)
    if rule is None:
        return "unknown"
    if rule.left_out or rule.refused:
        return f"left out: {rule.left_out}" if rule.left_out else f"refused: {rule.refused}"
    return ", ".join(rule.fields) or "together with others"


def _groups(words: Iterable[str]) -> Iterator[list[str]]:
    """Each argument with the words that follow it."""
    group: list[str] = []
    for word in words:
        if word.startswith("--") and group:
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _given(group: list[str]) -> Given:
    """`--name=word` counts as two words; names have hyphens or underscores, as in Megatron-LM."""
    first, *rest = group
    name, separator, value = first.partition("=")
    words = [value, *rest] if separator else rest
    name = name.removeprefix("--")
    # Megatron-LM itself has a few names with an underscore in them.
    return Given(name if name in ARGUMENTS else name.replace("_", "-"), tuple(words))


def _problems(given: Given) -> Iterator[str]:
    rule = rule_of(given.name)
    if rule is None:
        yield f"--{given.name} is no argument of Megatron-LM{did_you_mean(given.name, ARGUMENTS)}"
    elif rule.refused:
        yield f"--{given.name}: {rule.refused}"
    elif rule.arity == "none" and given.words:
        yield f"--{given.name} is followed by {' '.join(given.words)!r}, and takes nothing"
    elif rule.arity == "one" and len(given.words) != 1:
        told = f": {' '.join(given.words)}" if given.words else ""
        yield f"--{given.name} takes one word, not {len(given.words)}{told}"
    elif rule.arity == "many" and not given.words:
        yield f"--{given.name} takes one word or more"
