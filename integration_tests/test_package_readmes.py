"""The packages' READMEs are followed block by block, and their command lines parse."""

from pathlib import Path

import click
import pytest
from reader import Reader, runnable
from readme_blocks import blocks
from small_models import REPOSITORY

from megatron.bridge.cli.root import COMMANDS

READMES = [*sorted(REPOSITORY.glob("packages/*/README.md")), REPOSITORY / "recipes/README.md"]
# These build up an example over several blocks, which a test in the package itself runs.
TESTED_AT_HOME = ("data", "mimo")
FOLLOWED = {file: blocks(file.read_text("utf-8")) for file in READMES if file.parent.name not in TESTED_AT_HOME}
COMMAND_LINES = [
    words
    for file in READMES
    for block in blocks(file.read_text("utf-8"))
    if block.language in ("sh", "console")
    for words, _ in block.commands
    if words[:1] == ["megatron-bridge"]
]


@pytest.mark.parametrize("file", FOLLOWED, ids=lambda file: file.parent.name)
def test_its_blocks_run(file: Path, tmp_path: Path) -> None:
    """Each in a process of its own, all in one folder."""
    document = FOLLOWED[file]
    Reader(document, tmp_path / "reader", tmp_path / "outputs").read_to(document[-1])


@pytest.mark.parametrize("words", COMMAND_LINES, ids=" ".join)
def test_its_command_lines_parse(words: list[str]) -> None:
    """Names of commands and options are right; what the command does is tested elsewhere."""
    command: click.Command = COMMANDS[words[1]]
    rest = words[2:]
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), rest[0])
        assert found is not None, words
        command, rest = found, rest[1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "invoke", lambda context: None)
        command.make_context(words[1], rest)


def test_enough_is_found_to_test() -> None:
    assert {file.parent.name for file in FOLLOWED} >= {"conversion", "models", "training", "recipes"}
    assert all(len(runnable(document)) >= 1 for document in FOLLOWED.values())
    for name in TESTED_AT_HOME:
        assert list((REPOSITORY / "packages" / name / "tests").glob("test_*readme*.py")), name
    assert len(COMMAND_LINES) >= 2
