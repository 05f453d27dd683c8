"""`megatron-bridge config`: what a run would be configured with, why, and how two configurations differ."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.config_command import config
from megatron.bridge.training.overrides import apply_overrides, apply_yaml
from megatron.bridge.training.recipe_registry import RECIPES
from megatron.bridge.training.run_config import to_yaml


@pytest.fixture
def recipe(make_run: Callable[..., Any]) -> Iterator[str]:
    RECIPES.register("tiny_test_recipe", make_run)
    yield "tiny_test_recipe"
    RECIPES.unregister("tiny_test_recipe")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(config, arguments, catch_exceptions=False)


def test_what_is_shown_is_what_would_run(recipe: str, make_run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "shown.yaml").write_text(run("show", "--recipe", recipe, "train.train_iters=3").output)
    shown, expected = make_run(), make_run()
    apply_yaml(shown, tmp_path / "shown.yaml")
    apply_overrides(expected, ["train.train_iters=3"])
    assert shown == expected


def test_every_value_says_where_it_comes_from(recipe: str, tmp_path: Path) -> None:
    file = tmp_path / "more.yaml"
    file.write_text("optimizer:\n  lr: 0.5\ntrain:\n  micro_batch_size: 2\n")
    arguments = ["--recipe", recipe, "--config", str(file), "train.micro_batch_size=4"]
    found = {each["key"]: each for each in json.loads(run("explain", *arguments, "--all", "--json").output)}
    expected = {
        "optimizer.lr": (0.5, str(file)),
        "train.micro_batch_size": (4, "override"),
        "model.num_layers": (4, "recipe"),
        "train.eval_iters": (10, "default"),
    }
    for key, (value, origin) in expected.items():
        assert (found[key]["value"], found[key]["origin"]) == (value, origin)
    lines = run("explain", *arguments).output.splitlines()
    assert "optimizer.lr = 0.5" in "\n".join(lines)
    assert not any(line.startswith("train.eval_iters") for line in lines)


def test_differences_are_listed_by_key(recipe: str, make_run: Callable[..., Any], tmp_path: Path) -> None:
    cfg = make_run(lr=0.25, save="here")
    (tmp_path / "run.yaml").write_text(to_yaml(cfg))
    same, other = run("diff", recipe, recipe), run("diff", recipe, str(tmp_path / "run.yaml"))
    assert (same.exit_code, same.output) == (0, "no value differs\n")
    assert other.exit_code == 1
    assert "optimizer.lr: 0.003 -> 0.25" in other.output
    assert 'checkpoint.save: (default) -> "here"' in other.output
    assert "2 values differ" in other.output


def test_the_schema_knows_the_keys_and_their_types(recipe: str) -> None:
    schema = json.loads(run("schema", "--recipe", recipe).output)
    train = schema["properties"]["train"]
    assert train["additionalProperties"] is False
    assert train["properties"]["global_batch_size"] == {"type": "integer", "default": 8, "description": "int"}
    style = schema["properties"]["scheduler"]["properties"]["lr_decay_style"]
    assert "WSD" in style["enum"]
    assert schema["properties"]["model"]["properties"]["params_dtype"]["default"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("show", "--recipe", "tiny_test_recipee"), "did you mean 'tiny_test_recipe'"),
        (("diff", "tiny_test_recipe", "absent.yaml"), "absent.yaml"),
        (("diff", "tiny_test_recipe", __file__), "cannot be read"),
        (("explain", "--recipe", "tiny_test_recipe", "train.train_iter=3"), "did you mean 'train_iters'"),
    ],
)
def test_what_nobody_knows_is_refused(recipe: str, arguments: tuple[str, ...], problem: str) -> None:
    with pytest.raises(BridgeError, match=problem):
        run(*arguments)
