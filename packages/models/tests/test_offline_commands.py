"""`convert import|export --offline`, `convert diff` and `inspect`, as a user meets them."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

from megatron.bridge.cli.root import run
from megatron.bridge.conversion.diff import largest_difference
from megatron.bridge.testing import save_random_model

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands") / "hf"
    save_random_model(Qwen3Config(**SIZES, tie_word_embeddings=True), folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder):
    target = folder.with_name("megatron")
    assert run(["convert", "import", str(folder), str(target), "--offline"]) == 0
    return target


def changed(folder, target, **tensors):
    """A copy of a folder with some weights replaced (`None` removes one)."""
    import shutil

    shutil.copytree(folder, target)
    weights = {**load_file(folder / "model.safetensors"), **tensors}
    save_file({name: t for name, t in weights.items() if t is not None}, target / "model.safetensors", {"format": "pt"})
    return target


def test_there_and_back(folder, checkpoint, tmp_path, capsys):
    assert run(["convert", "export", str(checkpoint), str(tmp_path / "hf"), "--offline", "--workers", "2"]) == 0
    assert run(["convert", "diff", str(folder), str(tmp_path / "hf")]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["24 weights compared", "identical"]
    assert run(["convert", "diff", str(checkpoint), str(folder)]) == 0
    assert run(["convert", "diff", str(checkpoint), str(checkpoint)]) == 0


def test_what_contradicts_is_refused(folder, tmp_path, capsys):
    target = str(tmp_path / "megatron")
    assert run(["convert", "import", str(folder), target, "--offline", "--tp", "2"]) == 2
    assert "--offline uses no ranks" in capsys.readouterr().err
    assert run(["convert", "import", str(folder), target, "--workers", "2"]) == 2
    assert "--workers goes with --offline" in capsys.readouterr().err
    assert not (tmp_path / "megatron").exists()


def test_diff_tells_every_kind_of_difference(folder, checkpoint, tmp_path, capsys):
    weights = load_file(folder / "model.safetensors")
    norm, up = weights["model.norm.weight"], "model.layers.1.mlp.up_proj.weight"
    nudged = weights[up].clone()
    nudged[3, 4] += 0.5
    expected = float((nudged.double() - weights[up].double()).abs().max())
    names = {
        "model.norm.weight": norm.float(),
        up: nudged,
        "model.layers.0.mlp.up_proj.weight": None,
        "model.layers.0.mlp.more.weight": norm.clone(),
        "model.layers.0.self_attn.q_norm.weight": norm.clone(),
    }
    other = changed(folder, tmp_path / "other", **names)
    assert run(["convert", "diff", str(checkpoint), str(other), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result == {
        "same": False,
        "compared": 22,
        "only_first": ["model.layers.0.mlp.up_proj.weight"],
        "only_second": ["model.layers.0.mlp.more.weight"],
        "shapes": {"model.layers.0.self_attn.q_norm.weight": [[8], [32]]},
        "dtypes": {"model.norm.weight": ["bfloat16", "float32"]},
        "values": [[up, expected]],
    }
    assert run(["convert", "diff", str(checkpoint), str(other)]) == 1
    text = capsys.readouterr().out
    assert all(name in text for name in names)
    assert text.endswith("different\n")


def test_diff_of_a_tied_weight_that_is_written_twice(folder, tmp_path, capsys):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    twice = changed(folder, tmp_path / "twice", **{"lm_head.weight": embedding.clone()})
    assert run(["convert", "diff", str(folder), str(twice)]) == 0
    other = changed(folder, tmp_path / "other", **{"lm_head.weight": embedding + 1})
    assert run(["convert", "diff", str(folder), str(other)]) == 1
    assert "model.embed_tokens.weight and lm_head.weight" in capsys.readouterr().out


def test_diff_of_what_is_not_there(folder, tmp_path, capsys):
    assert run(["convert", "diff", str(folder), str(tmp_path / "nowhere")]) == 1
    assert f"{tmp_path / 'nowhere'} does not exist" in capsys.readouterr().err


def test_largest_difference():
    one = torch.tensor([1.0, -0.0, float("nan")])
    assert largest_difference(one, one.clone()) is None
    assert largest_difference(one[:2], torch.tensor([1.0, 0.0])) == 0.0
    assert largest_difference(one[:2], torch.tensor([1.0, 3.0])) == 3.0
    assert largest_difference(one[:2].bfloat16(), one[:2]) is None
    difference = largest_difference(one, torch.tensor([1.0, 0.0, 2.0]))
    assert difference is not None
    assert math.isnan(difference)


def test_inspect_shows_the_plan_of_either_side(folder, checkpoint, capsys):
    tables = []
    for path in (folder, checkpoint):
        assert run(["inspect", str(path), "--json"]) == 0
        tables.append(json.loads(capsys.readouterr().out))
    assert tables[0] == tables[1]
    rows = {row["megatron"]: row for row in tables[0]}
    assert rows["decoder.layers.1.self_attention.linear_qkv.weight"] == {
        "megatron": "decoder.layers.1.self_attention.linear_qkv.weight",
        "hf": [f"model.layers.1.self_attn.{p}_proj.weight" for p in "qkv"],
        "transform": "InterleaveGroups((16, 8, 8))",
        "shard": "Blocks(0, 1)",
        "shape": [64, 32],
        "dtype": "bfloat16",
        "nbytes": 64 * 32 * 2,
        "owner": "stage 0",
        "local_nbytes": 64 * 32 * 2,
    }
    held = {name for row in tables[0] for name in row["hf"]}
    assert held == load_file(folder / "model.safetensors").keys()
    assert run(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert all(f"model.layers.*.self_attn.{p}_proj.weight" in text for p in "qkvo")
    assert text.splitlines()[-1].startswith(f"{len(rows)} Megatron weights")


def test_inspect_tells_who_holds_what(folder, capsys):
    assert run(["inspect", str(folder), "--tp", "2", "--pp", "2", "--json"]) == 0
    rows = {row["megatron"]: row for row in json.loads(capsys.readouterr().out)}
    qkv = rows["decoder.layers.1.self_attention.linear_qkv.weight"]
    assert (qkv["owner"], qkv["local_nbytes"]) == ("stage 1", qkv["nbytes"] // 2)
    assert rows["embedding.word_embeddings.weight"]["owner"] == "stage 0 and 1"  # tied
    norm = rows["decoder.final_layernorm.weight"]
    assert (norm["owner"], norm["local_nbytes"]) == ("stage 1", norm["nbytes"])
    assert run(["inspect", str(folder), "--pp", "3"]) == 1
    assert "2 layers cannot be divided evenly over 3" in capsys.readouterr().err


def test_inspect_refuses_what_cannot_be_converted(folder, tmp_path, capsys):
    other = changed(folder, tmp_path / "other", **{"model.norm.weight": None})
    assert run(["inspect", str(other)]) == 1
    assert "model.norm.weight" in capsys.readouterr().err
