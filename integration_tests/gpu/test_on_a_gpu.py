"""What a GPU must show: the main job, the logits of every layer spec that runs on it, bf16, a resume to the bit.

`uv run pytest integration_tests/gpu` on a machine with one; elsewhere it is passed over. Speed and model FLOPs
utilisation are `uv run benchmarks/train.py --shape llama32_1b --bf16 --only bridge transformers`.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import save_small_llama, save_small_tokenizer

from megatron.bridge import platform

pytestmark = pytest.mark.skipif(not platform.cuda_available(), reason="needs a GPU")

SPECS = ["torch", *(["transformer_engine"] if importlib.util.find_spec("transformer_engine") else [])]


def bridge(*words: object, folder: Path) -> str:
    """`megatron-bridge WORDS` in a process of its own, which has CUDA to itself."""
    command = [sys.executable, "-c", "from megatron.bridge.cli.root import main; main()", *map(str, words)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def losses(run: Path) -> dict[int, float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return {record["iteration"]: record["loss"] for record in records if "loss" in record}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    save_small_tokenizer(folder)
    save_small_llama(folder)
    return folder


def test_the_main_job(tmp_path: Path) -> None:
    output = bridge("quickstart", "--tp", 1, "--steps", 40, folder=tmp_path)
    assert "20 weights bitwise equal" in output


@pytest.mark.parametrize("spec", SPECS)
def test_logits_and_round_trip(spec: str, model: Path, tmp_path: Path) -> None:
    certificate = tmp_path / "certificate.json"
    bridge("verify", model, "--layer-spec", spec, "--certificate", certificate, folder=tmp_path)
    assert json.loads(certificate.read_text("utf-8"))["passed"] is True


@pytest.mark.parametrize("spec", SPECS)
def test_bf16_training_goes_on_to_the_bit(spec: str, tmp_path: Path) -> None:
    sizes = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 256, "seq_length": 64, "vocab_size": 512}
    settings = {f"model.{name}": value for name, value in sizes.items()} | {
        "model.num_attention_heads": 4,
        "model.num_query_groups": 2,
        "model.layer_spec": spec,
        "model.deterministic_mode": True,
        "mixed_precision.precision": "bf16_mixed",
        "dataset.sequence_length": 64,
        "tokenizer.vocab_size": 512,
        "train.train_iters": 12,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 2,
        "train.eval_interval": "null",
        "scheduler.lr_warmup_iters": 0,
        "logger.log_interval": 1,
    }
    words = ["train", "--recipe", "llama32_1b_pretrain_config", "--nproc", 1]
    words += [f"{key}={value}" for key, value in settings.items()]
    bridge(*words, "--run-folder", "whole", folder=tmp_path)
    bridge(*words, "--run-folder", "parts", "train.exit_interval=5", folder=tmp_path)
    bridge(*words, "--run-folder", "parts", "--resume", "train.exit_interval=null", folder=tmp_path)
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert sorted(whole) == list(range(1, 13))
    assert parts == whole
