"""`megatron-bridge verify`: what it proves, what it finds, and the certificate that says so."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig

from megatron.bridge.cli.root import run
from megatron.bridge.conversion.layout_options import ranks_of
from megatron.bridge.testing import save_random_model

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(Hugging Face folder, checkpoint), of a mixture of experts"""
    root = tmp_path_factory.mktemp("verify")
    config = Qwen3MoeConfig(
        vocab_size=131,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        dtype="float32",
    )
    save_random_model(config, root / "hf")
    assert run(["convert", "import", str(root / "hf"), str(root / "megatron"), "--offline"]) == 0
    return root / "hf", root / "megatron"


def test_a_certificate_says_what_was_proven(folders, tmp_path, capsys):
    folder, checkpoint = folders
    file = tmp_path / "certificate.json"
    options = ["--megatron", str(checkpoint), "--ep", "2", "--certificate", str(file)]
    assert run(["verify", str(folder), *options]) == 0
    weights = load_file(folder / WEIGHTS)
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    assert f"{len(weights)} of {len(weights)} bitwise equal, {nbytes:,} bytes" in capsys.readouterr().out
    said = json.loads(file.read_text())
    assert said["passed"]
    assert (said["model"], said["megatron"]) == (str(folder), str(checkpoint))
    assert said["layout"] == {"expert_model_parallel_size": 2}
    assert (said["weights_compared"], said["bytes_compared"]) == (len(weights), nbytes)
    assert said["digests"]["hugging_face"] == said["digests"]["megatron"]
    assert said["versions"].keys() >= {"torch", "megatron-core", "transformers"}
    assert said["proven"][0] == f"all {len(weights)} weights ({nbytes:,} bytes) are bitwise equal"
    assert said["proven"][1].startswith("logits of 64 tokens agree within 1e-04")


@pytest.mark.parametrize("change", [1e-3, -0.0])
def test_any_difference_fails_and_is_named(folders, tmp_path, capsys, change):
    folder, _ = folders
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    weights, culprit = load_file(folder / WEIGHTS), "model.layers.1.mlp.experts.3.down_proj.weight"
    # One element in another expert's weight, once by as little as the sign of zero.
    weights[culprit][0, 0] = 0.0
    save_file(weights, other / WEIGHTS, {"format": "pt"})
    assert run(["convert", "import", str(other), str(tmp_path / "megatron"), "--offline"]) == 0
    weights[culprit][0, 0] = torch.tensor(change)
    save_file(weights, other / WEIGHTS, {"format": "pt"})
    file = tmp_path / "certificate.json"
    options = ["--megatron", str(tmp_path / "megatron"), "--pp", "2", "--certificate", str(file)]
    assert run(["verify", str(other), *options]) == 1
    assert f"1 of {len(weights)} weights differ: {culprit}" in capsys.readouterr().err
    said = json.loads(file.read_text())
    assert not said["passed"]
    assert said["weights_differing"] == [culprit]
    assert said["digests"]["hugging_face"] != said["digests"]["megatron"]
    assert not any("bitwise" in line for line in said["proven"])


def test_the_ranks_that_a_layout_needs():
    tensor, stages = "tensor_model_parallel_size", "pipeline_model_parallel_size"
    experts, expert_tensor = "expert_model_parallel_size", "expert_tensor_parallel_size"
    assert ranks_of({}) == 1
    assert ranks_of({tensor: 2, stages: 3}) == 6
    assert ranks_of({tensor: 2, experts: 2}) == 4
    assert ranks_of({tensor: 2, experts: 2, expert_tensor: 1}) == 2
    assert ranks_of({stages: 2, experts: 4}) == 8
