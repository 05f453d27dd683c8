"""The README's Python runs, in order, in an empty folder."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert re.search(r"\d+ documents, \d{7} tokens", capsys.readouterr().out)
    assert sorted(path.name for path in (tmp_path / "corpus").iterdir()) == [
        "cache",
        "python.bin",
        "python.idx",
        "python.json",
    ]


def test_readme_names_options_that_exist() -> None:
    from megatron.bridge.data.cli import preprocess

    known = {option for parameter in preprocess.params for option in parameter.opts}
    named = set(re.findall(r"--[a-z][a-z-]+", README.read_text("utf-8")))
    assert named
    assert named <= known
