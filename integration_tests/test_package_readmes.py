"""The packages' READMEs: each block of Python runs, and their command lines parse."""

from pathlib import Path

import click
import pytest
from forked import in_child
from readme_blocks import Block, blocks
from small_models import REPOSITORY, save_small_llama, save_small_tokenizer

from megatron.bridge.cli.root import COMMANDS

READMES = [*sorted(REPOSITORY.glob("packages/*/README.md")), REPOSITORY / "recipes/README.md"]
# These build up an example over several blocks, which a test in the package itself runs.
TESTED_AT_HOME = ("data", "mimo")
WITH_PYTHON = [
    file for file in READMES if file.parent.name not in TESTED_AT_HOME and "```python\n" in file.read_text("utf-8")
]
COMMAND_LINES = [
    words
    for file in READMES
    for block in blocks(file.read_text("utf-8"))
    if block.language in ("sh", "console")
    for words, _ in block.commands
    if words[:1] == ["megatron-bridge"]
]


def _run(file: Path, block: Block) -> int:
    # Line numbers of a failure are those of the README.
    exec(compile("\n" * (block.line - 1) + block.body, str(file), "exec"), {"__name__": "__main__"})
    return 0


@pytest.mark.parametrize("file", WITH_PYTHON, ids=lambda file: file.parent.name)
def test_its_python_runs(file: Path, tmp_path: Path) -> None:
    """Each block in a process of its own, all in one folder."""
    folder = tmp_path / "reader"
    save_small_tokenizer(folder / "meta-llama/Llama-3.2-1B")
    save_small_llama(folder / "meta-llama/Llama-3.2-1B")
    for block in blocks(file.read_text("utf-8")):
        if block.language == "python":
            ended = in_child(lambda block=block: _run(file, block), folder, tmp_path / "outputs")
            assert ended.code == 0, ended.err


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
    assert {file.parent.name for file in WITH_PYTHON} >= {"conversion", "models", "training", "recipes"}
    for name in TESTED_AT_HOME:
        assert list((REPOSITORY / "packages" / name / "tests").glob("test_*readme*.py")), name
    assert len(COMMAND_LINES) >= 2
