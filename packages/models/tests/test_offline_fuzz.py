"""Generated damage to indexes and configurations: each is refused by name, or does not matter and changes nothing."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from megatron.bridge.conversion.auto_bridge import AutoBridge
from megatron.bridge.conversion.hf import HFWeights
from megatron.bridge.conversion.offline import export_checkpoint, import_checkpoint
from megatron.bridge.conversion.offline.importer import offline_import_plan
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import save_random_model

CONFIG = LlamaConfig(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    dtype="float32",
)
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ODD = (None, -1, 0, 3, 1e30, "x", "", [], {}, [1], True, {"a": None})


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(folder of two shards, its weights, its index, its configuration)"""
    root = tmp_path_factory.mktemp("fuzz")
    weights = save_random_model(CONFIG, root / "one")
    folder = root / "hf"
    folder.mkdir()
    names = sorted(weights)
    placed = {name: SHARDS[number % 2] for number, name in enumerate(names)}
    for shard in SHARDS:
        save_file({n: weights[n] for n in names if placed[n] == shard}, folder / shard, {"format": "pt"})
    config = json.loads((root / "one" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))
    import_checkpoint(folder, root / "megatron")
    return folder, weights, placed, config


def refused(folder, *culprits):
    with pytest.raises(BridgeError) as caught:
        offline_import_plan(AutoBridge.from_hf_pretrained(folder))
    assert all(culprit in str(caught.value) for culprit in culprits), str(caught.value)


@pytest.fixture
def spoil(good):
    """Writes another index for the length of a test."""
    file = good[0] / INDEX
    kept = file.read_bytes()
    yield lambda text: file.write_text(text if isinstance(text, str) else json.dumps(text))
    file.write_bytes(kept)


def test_each_name_missing_from_the_index(good, spoil):
    folder, _, placed, _ = good
    for name in placed:
        spoil({"weight_map": {key: file for key, file in placed.items() if key != name}})
        refused(folder, name, INDEX)


def test_each_name_in_the_wrong_file(good, spoil):
    folder, _, placed, _ = good
    for name, file in placed.items():
        spoil({"weight_map": {**placed, name: SHARDS[1 - SHARDS.index(file)]}})
        refused(folder, name)


def test_each_name_once_more_under_another(good, spoil):
    folder, _, placed, _ = good
    for name, file in placed.items():
        spoil({"weight_map": {**placed, f"{name}_again": file}})
        refused(folder, f"{name}_again", INDEX)


def test_each_name_in_two_files(good, tmp_path):
    folder, weights, placed, config = good
    other = tmp_path / "hf"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    (other / INDEX).write_bytes((folder / INDEX).read_bytes())
    for twice in placed:
        for shard in SHARDS:
            held = {name: weights[name] for name in placed if placed[name] == shard or name == twice}
            save_file(held, other / shard, {"format": "pt"})
        refused(other, twice, "twice")


@pytest.mark.parametrize("file", [None, 3, "", "no such file", "/etc/passwd", "../up.safetensors", "config.json"])
def test_files_that_an_index_may_not_name(good, spoil, file):
    folder, _, placed, _ = good
    for name in list(placed)[:4]:
        spoil({"weight_map": {**placed, name: file}})
        refused(folder, str(folder))


@pytest.mark.parametrize("seed", range(4))
def test_flipped_and_cut_indexes(good, spoil, seed):
    folder, weights, placed, _ = good
    chosen, text = random.Random(seed), json.dumps({"weight_map": placed})
    for _ in range(20):
        if chosen.random() < 0.3:
            spoil(text[: chosen.randrange(len(text))])
        else:
            place = chosen.randrange(len(text))
            spoil(text[:place] + chr(ord(text[place]) ^ 1 << chosen.randrange(6)) + text[place + 1 :])
        message = fault(folder)
        assert HFWeights(folder).keys() == weights.keys() if message is None else str(folder) in message


def fault(folder):
    """Why a folder cannot be opened, or None."""
    try:
        HFWeights(folder)
    except BridgeError as error:
        return str(error)
    return None


def outcome(good, target, config):
    """The refusal's message, or None when the same model came out."""
    folder = good[0]
    (folder / "config.json").write_text(json.dumps(config))
    try:
        import_checkpoint(folder, target / "megatron", overwrite=True)
        export_checkpoint(target / "megatron", target / "hf", overwrite=True)
    except BridgeError as error:
        return str(error)
    finally:
        (folder / "config.json").write_text(json.dumps(good[3]))
    back = load_file(target / "hf" / "model.safetensors")
    assert back.keys() == good[1].keys()
    assert all(torch.equal(back[name], good[1][name]) for name in back)
    return None


def test_each_field_missing_from_the_configuration(good, tmp_path):
    refusals = {}
    for field in good[3]:
        config = {key: value for key, value in good[3].items() if key != field}
        if message := outcome(good, tmp_path, config):
            refusals[field] = message
    assert refusals.keys() >= {"architectures", "model_type", "hidden_size", "num_hidden_layers", "vocab_size"}


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_each_field_with_an_odd_value(good, tmp_path, odd):
    refusals = {}
    for field, value in good[3].items():
        if value != odd and (message := outcome(good, tmp_path, {**good[3], field: odd})):
            refusals[field] = message
    assert refusals.keys() >= {"architectures", "hidden_size", "num_hidden_layers"}
