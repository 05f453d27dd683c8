"""`megatron-bridge recipes`: without torch, in an instant; and a copy of a recipe trains."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron.bridge.errors import BridgeError
from megatron.bridge.recipes.commands.root import recipes

_PROGRAM = """
import sys
from megatron.bridge.cli.root import run
code = run({arguments!r})
heavy = sorted({{"torch", "transformers", "megatron.core", "numpy"}} & sys.modules.keys())
sys.exit(f"imported {{heavy}}" if heavy else code)
"""


@pytest.mark.parametrize(
    "arguments",
    [["ls"], ["show", "llama31_8b_pretrain_config"], ["diff", "gpt2_lora_config", "gpt2_lora_config"]],
    ids=lambda arguments: arguments[0],
)
def test_it_is_quick_and_torch_free(arguments: list[str], tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):
        before = os.times()
        program = _PROGRAM.format(arguments=["recipes", *arguments])
        ended = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        after = os.times()
        assert ended.returncode == 0, ended.stderr
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.4


def called(*arguments: str) -> str:
    result = CliRunner().invoke(recipes, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_ls_finds_models_by_words() -> None:
    found = json.loads(called("ls", "llama", "3.2", "--json"))
    assert [each["model"] for each in found] == ["llama32_1b", "llama32_3b"]
    assert found[0]["recipes"][0] == "llama32_1b_pretrain_config"
    assert "mixtral_8x7b" in called("ls")


def test_show_names_the_source_of_each_value() -> None:
    shown = called("show", "llama31_405b_pretrain_config", "seq_length=16384")
    assert "optimizer.lr = 8e-05  arXiv:2407.21783, section 3.4 and table 3" in shown
    assert "hf_config.hidden_size = 16384  meta-llama/Llama-3.1-405B, config.json" in shown
    assert "model.seq_length = 16384  given to the recipe" in shown
    with pytest.raises(BridgeError, match="has no argument 'seq'"):
        called("show", "llama31_8b_pretrain_config", "seq=3")
    with pytest.raises(BridgeError, match="did you mean 'llama31_8b_pretrain_config'"):
        called("show", "llama31_8b_pretrain")


def test_diff_lists_what_differs() -> None:
    result = CliRunner().invoke(recipes, ["diff", "llama3_8b_pretrain_config", "llama31_8b_pretrain_config"])
    assert result.exit_code == 1
    assert "hf_config.max_position_embeddings: 8192 -> 131072" in result.output
    assert result.output.endswith("2 values differ\n")


def test_a_copy_describes_the_same_and_is_never_written_over(tmp_path: Path) -> None:
    from megatron.bridge.training.recipe_registry import RECIPES

    for name in ("gemma3_1b_lora_config", "qwen25_vl_3b_pretrain_config", "deepseek_v3_pretrain_config"):
        file = tmp_path / f"{name}.py"
        called("cp", name, str(file))
        assert runpy.run_path(str(file))["RECIPE"] == RECIPES[name].describe()
        with pytest.raises(BridgeError, match="exists; give another name"):
            called("cp", name, str(file))
    assert len(list(tmp_path.iterdir())) == 3
