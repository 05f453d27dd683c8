"""A tiny variant of a recipe trains two steps through the same code; `just recipes` does so with all of them."""

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

from megatron.bridge.recipes.base.trial import trial
from megatron.bridge.recipes.commands.copying import write
from megatron.bridge.testing import import_engine, run_ranks
from megatron.bridge.training.recipe_registry import RECIPES

# The kinds of models and tasks; the rest is in docs/recipe-book.md.
SOME = (
    "llama32_1b_pretrain_config",
    "gemma3_1b_finetune_config",
    "qwen3_30b_a3b_lora_config",
    "gpt_oss_20b_pretrain_config",
    "nemotron_h_8b_pretrain_config",
    "llava15_7b_finetune_config",
)


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    import_engine()
    torch.set_num_threads(1)


def test_tiny_variants_train() -> None:
    def losses() -> dict[str, list[float]]:
        return {name: list(trial(RECIPES[name].describe()).losses.values()) for name in SOME}

    found = run_ranks(1, losses, timeout=280)[0]
    for name, (first, second) in found.items():
        # Random weights: somewhere near the logarithm of a vocabulary of 512.
        assert first == pytest.approx(math.log(512), abs=1.5), name
        assert second != first, name


def test_a_written_recipe_trains_as_a_script(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from megatron.bridge.recipes.base.shrunk import shrunk

    file = tmp_path / "mine.py"
    write(file, "llama32_1b_pretrain_config", shrunk(RECIPES["llama32_1b_pretrain_config"].describe()))

    def run(*overrides: str) -> int | str | None:
        sys.argv = [str(file), *overrides]
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as ended:
            return ended.code
        return None

    def both() -> tuple[int | str | None, ...]:
        return run("train.train_iters=3", f"logger.folder={tmp_path}"), run("train.train_iter=3"), run("--dry-run")

    assert run_ranks(1, both, timeout=200)[0] == (0, 1, 0)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    printed = capfd.readouterr()
    assert "did you mean 'train_iters'" in printed.err
    assert "num_layers: 2" in printed.out
