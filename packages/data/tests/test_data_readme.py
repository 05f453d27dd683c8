"""The README's Python runs, in order, in an empty folder."""

import re
import shlex
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
_CONSOLE = r"^```console\n\$ megatron-bridge data (.*?)\n(.*?)^```"


def test_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert re.search(r"\d+ documents, \d{7} tokens", capsys.readouterr().out)
    _shows_what_it_says(capsys, monkeypatch)
    assert sorted(path.name for path in (tmp_path / "corpus").iterdir()) == [
        "cache",
        "python.bin",
        "python.idx",
        "python.json",
    ]


def _shows_what_it_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The console block, `...` standing for anything."""
    from megatron.bridge.data.cli import data

    (block,) = re.findall(_CONSOLE, README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    monkeypatch.setenv("COLUMNS", "200")
    data(shlex.split(block[0]), standalone_mode=False)
    pattern = ".*".join(map(re.escape, block[1].strip().split("...")))
    assert re.fullmatch(pattern, capsys.readouterr().out.strip(), re.DOTALL)


def test_readme_names_options_that_exist() -> None:
    from megatron.bridge.data.cli import data

    known = {option for command in data.commands.values() for each in command.params for option in each.opts}
    named = set(re.findall(r"--[a-z][a-z-]+", README.read_text("utf-8")))
    assert named
    assert named <= known
