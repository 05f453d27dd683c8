"""The workflows of Primus from its command lines, and what they refuse."""

import json
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from primus.cli.convert import convert
from primus.cli.main import primus
from primus.megatron_bridge.adapter import MegatronBridgeAdapter
from primus.megatron_bridge.argument_builder import GUIDELINES, SECTIONS
from primus.megatron_bridge.patches import PATCHES

from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import run_ranks, save_random_model

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in both formats, and rows."""
    from transformers import LlamaConfig

    from megatron.bridge.data.tokenizers import train_bpe_tokenizer

    folder = tmp_path_factory.mktemp("primus")
    train_bpe_tokenizer(["a"], 259, folder / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": 259, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    save_random_model(LlamaConfig(**sizes, **ids, max_position_embeddings=512, dtype="float32"), folder / "model")
    rows = [{"instruction": f"Say {at}.", "input": "", "output": str(at)} for at in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = README.read_text("utf-8")
    (folder / "sft.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    return folder


def documented() -> list[list[str]]:
    """The command lines of the README, as words."""
    blocks = [block.split("```")[0] for block in README.read_text("utf-8").split("```sh\n")[1:]]
    return [shlex.split(block.replace("\\\n", " ")) for block in blocks]


def follow(folder: Path) -> list[int]:
    """Every command line of the README, in order, in one rank; the Megatron checkpoint is made first."""
    import os

    os.chdir(folder)
    importing = "--framework megatron_bridge --convert_from_hf --hf_model_name_or_path model --save checkpoints/llama"
    CliRunner().invoke(convert, shlex.split(importing), catch_exceptions=False)
    codes = []
    for words in documented():
        command, given = (primus, words[1:]) if words[0] == "primus" else (convert, words[3:])
        codes.append(CliRunner().invoke(command, given, catch_exceptions=False).exit_code)
    return codes


def test_the_documented_command_lines_run_and_export_what_transformers_loads(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert len(documented()) == 4
    assert run_ranks(1, follow, folder, timeout=200)[0] == [0, 0, 0, 0]
    before = AutoModelForCausalLM.from_pretrained(folder / "model")
    # Both started from the same weights and saw the same data in the same order.
    tuned, exported = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("tuned", "exported"))
    assert AutoTokenizer.from_pretrained(folder / "exported").eos_token == "<|end_of_text|>"
    alike = zip(before.named_parameters(), tuned.parameters(), exported.parameters(), strict=True)
    for (name, start), one, other in alike:
        assert torch.equal(one, other), name
        assert not torch.equal(one, start), name
    lora = dict(AutoModelForCausalLM.from_pretrained(folder / "tuned_lora").named_parameters())
    changed = {name for name, start in before.named_parameters() if not torch.equal(lora[name], start)}
    # The linear layers of attention and MLP, and nothing else.
    assert changed == {name for name in lora if name.endswith("_proj.weight")}


def built(tmp_path: Path, file: dict[str, Any] | None = None, **flags: Any) -> dict[str, Any]:
    if file is not None:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(file))
        flags["config"] = str(tmp_path / "config.yaml")
    return MegatronBridgeAdapter().arguments({"framework": "megatron_bridge", **flags})


def test_flags_come_before_the_file_and_the_file_before_the_guidelines(tmp_path: Path) -> None:
    found = built(tmp_path, {"training": {"lr": "1e-3", "min_lr": 1e-4}}, lr=2e-3)
    assert (found["lr"], found["min_lr"], found["global_batch_size"]) == (
        2e-3,
        1e-4,
        GUIDELINES["global_batch_size"][0],
    )
    lora = built(tmp_path, use_lora=True, train_iters=50)
    assert (lora["lr"], lora["lora_rank"], lora["lora_alpha"], lora["lr_warmup_iters"]) == (2e-4, 16, 32, 5)


def test_arguments_reach_the_configuration(tmp_path: Path, folder: Path) -> None:
    file = {
        "training": {"micro_batch_size": 2, "lr": 1e-3, "seed": 7},
        "data": {"data_path": str(folder / "rows.jsonl"), "split": "90,10,0"},
        "parallelism": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "precision": {"precision": "fp32"},
        "logging": {"log_interval": 5},
        "lora": {"use_lora": False, "lora_rank": 4},
        "model": {"hf_model_name_or_path": str(folder / "model"), "seq_length": 128},
        "convert_from_hf": True,
    }
    adapter = MegatronBridgeAdapter()
    cfg = adapter.trainer(built(tmp_path, file)).configured()
    assert (cfg.train.micro_batch_size, cfg.optimizer.lr, cfg.rng.seed, cfg.logger.log_interval) == (2, 1e-3, 7, 5)
    assert (cfg.dataset.split, cfg.dataset.dataset_format, cfg.dataset.prompt_template) == (
        "90,10,0",
        "alpaca",
        "alpaca",
    )
    assert (cfg.model.tensor_model_parallel_size, cfg.model.sequence_parallel, cfg.model.seq_length) == (2, True, 128)
    assert not cfg.dataset.packing
    patched = adapter.trainer(built(tmp_path, file | {"patches": ["packing"]})).configured()
    assert (patched.dataset.packing, patched.train.micro_batch_size) == (True, 1)


@pytest.mark.parametrize(
    ("file", "flags", "why"),
    [
        ({"trainin": {"lr": 1}}, {}, "unknown section 'trainin'; did you mean 'training'"),
        ({"training": {"learning_rat": 1, "lrr": 1}}, {}, "unknown key 'training.learning_rat'.*'training.lrr'"),
        ({"model": {"load": "a"}, "checkpointing": {"load": "b"}}, {}, "'load' is given twice"),
        ({"framework": "megatron"}, {}, "framework 'megatron' is not here; did you mean"),
        (None, {"framework": "torchtitan"}, "framework 'torchtitan' is not here"),
        (None, {"lora_rank": 4}, "--lora_rank means nothing without LoRA; add --use_lora"),
        ({"lora": {"use_lora": True, "save_lora_only": False}}, {}, "save_lora_only=false is not possible"),
        (None, {"load": "x"}, "no data: set --data_path"),
        (None, {"data_path": "x"}, "no weights to start from: set --load"),
        (None, {"data_path": "x", "convert_from_hf": True}, "set --hf_model_name_or_path"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path: Path, file: Any, flags: dict[str, Any], why: str) -> None:
    with pytest.raises(BridgeError, match=why):
        MegatronBridgeAdapter().trainer(built(tmp_path, file, **flags)).configured()


def test_an_export_needs_a_folder_and_a_conversion_a_direction() -> None:
    trainer = MegatronBridgeAdapter().trainer({"convert_to_hf": True})
    with pytest.raises(BridgeError, match="set hf_save_path"):
        trainer._callbacks()
    for words, why in (("", "say which way"), ("--convert_to_hf", "needs --load and --hf_save_path")):
        with pytest.raises(BridgeError, match=why):
            CliRunner().invoke(convert, ["--framework", "megatron_bridge", *words.split()], catch_exceptions=False)
    with pytest.raises(BridgeError, match="did you mean 'packing'"):
        PATCHES["pakcing"]


def test_the_module_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["convert", "--framework", "nemo"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("primus.cli.convert", run_name="__main__")
    assert ended.value.code == 1
    assert "error: framework 'nemo' is not here" in capsys.readouterr().err
    assert "lora" in SECTIONS
