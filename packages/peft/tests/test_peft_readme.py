"""The README's method of your own runs, and does what the README says."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})
    (promised,) = re.findall(r"# (NormTuning: .*) \.\.\.", block)
    assert capsys.readouterr().out.splitlines() == [promised, "  final_norm (LayerNorm)"]
