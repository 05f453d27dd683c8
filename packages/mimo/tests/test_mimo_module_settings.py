"""Settings of the optimizer for single modules: what is wrong with them, and what Megatron-Core is told."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron.bridge.mimo import ModuleOptimizerConfig
from megatron.bridge.mimo.module_settings import module_overrides, settings_problems

MODULES = ["images", "images.projector", "text"]
RUN: Any = SimpleNamespace(lr=1e-3, min_lr=1e-4)


@pytest.mark.parametrize(
    ("key", "own", "told"),
    [
        ("image", {}, "optimizers['image']: no such module; did you mean 'images'"),
        ("images", {"lr": 1e-5}, "'images': lr=1e-05 is below min_lr=0.0001, which is the run's; set a lower min_lr"),
        ("images", {"lr": 1e-5, "min_lr": 1e-4}, "lr=1e-05 is below min_lr=0.0001, which is its own"),
        ("text", {"min_lr": 1e-2}, "'text': lr=0.001 is below min_lr=0.01"),
        ("text", {"weight_decay": -0.1}, "weight_decay=-0.1 must not be negative"),
    ],
)
def test_settings_that_cannot_be_are_told_by_module(key: str, own: dict[str, float], told: str) -> None:
    assert any(told in each for each in settings_problems({key: ModuleOptimizerConfig(**own)}, MODULES, RUN))


def test_good_settings_have_no_problem() -> None:
    own = ModuleOptimizerConfig(lr=1e-4, min_lr=0.0, weight_decay=0.1)
    assert not [*settings_problems({"images.projector": own, "text": own}, MODULES, RUN)]


def told(name: str, by_module: dict[str, ModuleOptimizerConfig]) -> dict[str, dict[str, float]]:
    """What Megatron-Core is told of a tower's weight and a projector's."""
    module: Any = SimpleNamespace(is_projector=lambda name: name.startswith("input_projections."))
    found: dict[str, dict[str, float]] = {}
    overrides = module_overrides(name, by_module, module)
    for weight in ("encoders.tower.weight", "input_projections.0.weight"):
        met = [values for key, values in overrides.items() if key.matches(None, f"module.{weight}")]
        found[weight.partition(".")[0]] = {} if not met else met[0]
        assert len(met) < 2
    return found


def test_a_projector_has_what_its_module_has_but_for_its_own() -> None:
    by_module = {
        "images": ModuleOptimizerConfig(lr=1e-5, weight_decay=0.0),
        "images.projector": ModuleOptimizerConfig(lr=1e-4, min_lr=1e-6),
        "text": ModuleOptimizerConfig(lr=1.0),
    }
    assert told("images", by_module) == {
        "encoders": {"max_lr": 1e-5, "start_wd": 0.0, "end_wd": 0.0},
        "input_projections": {"max_lr": 1e-4, "min_lr": 1e-6, "start_wd": 0.0, "end_wd": 0.0},
    }


def test_a_projector_alone_leaves_its_tower_to_the_run() -> None:
    by_module = {"images.projector": ModuleOptimizerConfig(lr=1e-4)}
    assert told("images", by_module) == {"encoders": {}, "input_projections": {"max_lr": 1e-4}}
