"""The README's code runs, and prints what the README says."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = README.read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```\n+```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("```python") == 2
    names: dict[str, object] = {"__name__": "readme"}
    for code, printed in blocks:
        exec(compile(code, str(README), "exec"), names)
        assert capsys.readouterr().out == printed
