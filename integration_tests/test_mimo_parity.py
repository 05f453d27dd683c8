"""MIMO placements of all three modes train as transformers and torch do."""

from pathlib import Path

import pytest
from mimo_parity.cases import QUICK, WIDE
from mimo_parity.measured import measured

PAGE = Path(__file__).parents[1] / "docs/mimo-parity.md"
TOLERANCE = {"loss": 1e-5, "norm": 1e-5, "gradient": 1e-4, "weight": 1e-4}


@pytest.mark.timeout(600)
def test_every_mode_trains_as_transformers_does(tmp_path: Path) -> None:
    found = measured(QUICK, tmp_path)
    assert len(found) == len(QUICK)
    for placement, distance in found.items():
        beyond = {what: getattr(distance, what) for what, most in TOLERANCE.items() if getattr(distance, what) > most}
        assert not beyond, f"{placement}: {beyond}"


def test_the_page_has_every_placement() -> None:
    text = PAGE.read_text("utf-8")
    assert all(f"| {case.mode} | {case.name} |" in text for case in (*QUICK, *WIDE))
