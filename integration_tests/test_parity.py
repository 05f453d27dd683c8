"""Parallel layouts train as one rank does, and one rank trains as a plain torch loop over transformers does.

All layouts are trained by `just parity`, which takes longer than a run of the tests should.
"""

from pathlib import Path

import pytest
from parity.curves import Difference
from parity.kinds import KINDS, LAYOUTS, OFTEN, one_step
from parity.layouts import ONE
from parity.measured import measured
from parity.models import MODELS
from parity.page import PLAIN

PAGE = Path(__file__).parents[1] / "docs/parity.md"
TOLERANCE = {"loss": 1e-5, "norm": 1e-5, "weight": 1e-5}


@pytest.mark.timeout(900)  # several layouts of up to four ranks, on a machine that may be busy
@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.often])
def test_a_model_trains_as_on_one_rank(name: str, tmp_path: Path) -> None:
    layouts = {layout: MODELS[name].layouts[layout] for layout in MODELS[name].often}
    found = measured(MODELS[name], tmp_path / "hf", layouts)
    assert found.keys() >= layouts.keys() - {ONE}
    refused = {layout: why for layout, why in found.items() if isinstance(why, str)}
    assert not refused
    for layout, each in found.items():
        assert isinstance(each, Difference)
        beyond = {what: getattr(each, what) for what, most in TOLERANCE.items() if getattr(each, what) > most}
        assert not beyond, f"{layout}: {beyond}"


@pytest.mark.timeout(600)
def test_models_of_other_kinds_take_the_step_of_one_rank(tmp_path: Path) -> None:
    found = one_step(OFTEN, tmp_path)
    for name, by_layout in found.items():
        assert by_layout.keys() == LAYOUTS.keys() - {ONE}
        for layout, each in by_layout.items():
            beyond = {what: getattr(each, what) for what, most in TOLERANCE.items() if getattr(each, what) > most}
            assert not beyond, f"{name} at {layout}: {beyond}"


def test_the_page_has_every_model_and_layout() -> None:
    text = PAGE.read_text("utf-8")
    assert "`just parity`" in text
    assert all(name in text for name in (*MODELS, *KINDS))
    assert all(f"| {layout} |" in text for model in MODELS.values() for layout in {*model.layouts, PLAIN} - {ONE})
