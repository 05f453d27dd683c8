"""A checkpoint of a thousand experts in sixty layers is planned in seconds."""

import importlib.util
from pathlib import Path

import pytest


def _benchmark():
    spec = importlib.util.spec_from_file_location("plan", Path(__file__).parents[1] / "benchmarks" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("stacked", [False, True])
def test_a_thousand_experts_in_sixty_layers_are_planned_in_seconds(stacked):
    seconds = _benchmark().plan_all(60, 1000, stacked=stacked)
    assert seconds["import plan"] < 5, seconds
    assert seconds["export plan"] < 5, seconds
