"""Damaged and misfitting inputs of the offline conversion: an error that names the culprit, and nothing left behind."""

import json
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from megatron.bridge.conversion.offline import export_checkpoint, import_checkpoint
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
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(Hugging Face folder, its weights, checkpoint, exported files)"""
    root = tmp_path_factory.mktemp("damage")
    weights = save_random_model(CONFIG, root / "hf")
    import_checkpoint(root / "hf", root / "megatron", file_bytes=20_000)
    export_checkpoint(root / "megatron", root / "back")
    return root / "hf", weights, root / "megatron", root / "back"


def refused(folder, target, culprit, convert=import_checkpoint):
    """The message of the refusal, which must match `culprit`; nothing under the target's name."""
    with pytest.raises(BridgeError, match=culprit) as caught:
        convert(folder, target)
    assert not target.exists() or not any(target.glob("iter_*"))
    return str(caught.value)


def refusal(convert, folder, target):
    """The message, or None when the conversion went through."""
    try:
        convert(folder, target)
    except BridgeError as error:
        return str(error)
    return None


def copied(good_folder, tmp_path, number):
    return shutil.copytree(good_folder, tmp_path / f"case{number}")


@pytest.mark.parametrize("seed", range(4))
def test_truncated_weight_files(good, tmp_path, seed):
    data = (good[0] / WEIGHTS).read_bytes()
    chosen = random.Random(seed)
    for number in range(15):
        folder = copied(good[0], tmp_path, number)
        (folder / WEIGHTS).write_bytes(data[: chosen.randrange(len(data))])
        refused(folder, tmp_path / "out", re.escape(str(folder / WEIGHTS)))


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_in_a_header(good, tmp_path, seed):
    """A flip in the length or the table is refused, or it meets what carries no meaning and changes nothing."""
    data = (good[0] / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    chosen = random.Random(seed)
    count = 0
    for number in range(15):
        folder = copied(good[0], tmp_path, number)
        flipped = bytearray(data)
        flipped[chosen.randrange(header)] ^= 1 << chosen.randrange(8)
        (folder / WEIGHTS).write_bytes(flipped)
        message = refusal(import_checkpoint, folder, tmp_path / f"out{number}")
        if message is not None:
            count += 1
            assert re.search(rf"{WEIGHTS}|weight|layers", message)
            assert not list((tmp_path / f"out{number}").glob("iter_*"))
        else:
            assert _exported(tmp_path / f"out{number}", tmp_path / f"hf{number}") == _bytes(good[3])
    assert count >= 13


def _exported(checkpoint, folder):
    export_checkpoint(checkpoint, folder)
    return _bytes(folder)


def _bytes(folder):
    return (folder / WEIGHTS).read_bytes()


def misshapen(tensor, way):
    rows = tensor.shape[0]
    return {
        "fewer rows": lambda: tensor[: rows // 2],
        "one row more": lambda: torch.cat([tensor, tensor[:1]]),
        "one axis more": lambda: tensor[None],
        "flat": lambda: torch.cat([tensor.reshape(-1), tensor.reshape(-1)]),
        "empty": lambda: tensor[:0],
        "scalar": lambda: tensor.reshape(-1)[0],
    }[way]().contiguous()


WAYS = ("fewer rows", "one row more", "one axis more", "flat", "empty", "scalar")


@pytest.mark.parametrize("way", WAYS)
def test_each_weight_in_another_shape(good, tmp_path, way):
    folder, weights = copied(good[0], tmp_path, 0), good[1]
    for name, tensor in weights.items():
        save_file({**weights, name: misshapen(tensor, way)}, folder / WEIGHTS, {"format": "pt"})
        message = refused(folder, tmp_path / "out", re.escape(name))
        assert "shape" in message or "columns" in message or "configuration" in message


def test_each_weight_missing_or_under_another_name(good, tmp_path):
    folder, weights = copied(good[0], tmp_path, 0), good[1]
    for name in weights:
        others = {key: tensor for key, tensor in weights.items() if key != name}
        save_file(others, folder / WEIGHTS, {"format": "pt"})
        refused(folder, tmp_path / "out", re.escape(name).replace(r"layers\.1", "layers.1"))
        save_file({**others, f"{name}_old": weights[name]}, folder / WEIGHTS, {"format": "pt"})
        refused(folder, tmp_path / "out", re.escape(f"{name}_old"))


def test_a_whole_layer_missing_or_too_many(good, tmp_path):
    folder, weights = copied(good[0], tmp_path, 0), good[1]
    save_file({k: v for k, v in weights.items() if ".1." not in k}, folder / WEIGHTS, {"format": "pt"})
    refused(folder, tmp_path / "out", r"layers without weights: \[1\]")
    more = {k.replace(".1.", ".2."): v.clone() for k, v in weights.items() if ".1." in k}
    save_file({**weights, **more}, folder / WEIGHTS, {"format": "pt"})
    refused(folder, tmp_path / "out", r"layers beyond the configuration's 2: \[2\]")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 1),
        ("hidden_size", 64),
        ("intermediate_size", 96),
        ("vocab_size", 66),
        ("vocab_size", 68),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("num_key_value_heads", 1),
        ("tie_word_embeddings", True),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("architectures", ["NoSuchForCausalLM"]),
        ("architectures", []),
        ("model_type", "no_such_type"),
    ],
)
def test_a_configuration_of_another_model(good, tmp_path, field, value):
    folder = copied(good[0], tmp_path, 0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": None, field: value}))
    refused(folder, tmp_path / "out", ".")
    # The same configuration does not describe the checkpoint either.
    checkpoint = copied(good[2], tmp_path, "checkpoint")
    shutil.copyfile(folder / "config.json", checkpoint / "iter_0000000" / "hf" / "config.json")
    if field != "vocab_size":  # which of the padded rows are real, only the configuration says
        refused(checkpoint, tmp_path / "hf", ".", export_checkpoint)


@pytest.mark.parametrize("seed", range(5))
def test_damaged_checkpoints(good, tmp_path, seed):
    """Any flipped bit of any weight is found by its checksum; any cut by the sizes."""
    chosen = random.Random(seed)
    files = sorted((good[2] / "iter_0000000").glob("*.distcp"))[:-1]
    refusals = 0
    for number in range(20):
        checkpoint = copied(good[2], tmp_path, number)
        file = checkpoint / "iter_0000000" / chosen.choice(files).name
        data = bytearray(file.read_bytes())
        if chosen.random() < 0.3:
            data = data[: chosen.randrange(len(data))]
        else:
            data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        file.write_bytes(data)
        target = tmp_path / f"hf{number}"
        message = refusal(export_checkpoint, checkpoint, target)
        if message is not None:
            refusals += 1
            assert file.name in message
            assert not target.exists()
        else:  # time stamps and padding of the archives carry no meaning
            assert _bytes(target) == _bytes(good[3])
    assert refusals >= 14


@pytest.mark.parametrize("seed", range(4))
def test_damaged_metadata(good, tmp_path, seed):
    chosen = random.Random(100 + seed)
    refusals = 0
    for number in range(20):
        checkpoint = copied(good[2], tmp_path, number)
        file = checkpoint / "iter_0000000" / ".metadata"
        data = bytearray(file.read_bytes())
        if chosen.random() < 0.3:
            data = data[: chosen.randrange(len(data))]
        else:
            data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        file.write_bytes(data)
        target = tmp_path / f"hf{number}"
        message = refusal(export_checkpoint, checkpoint, target)
        if message is not None:
            refusals += 1
            assert str(checkpoint) in message
            assert not target.exists()
        else:
            assert _bytes(target) == _bytes(good[3])
    assert refusals >= 14


def test_weights_of_the_wrong_values_under_a_tied_name_are_refused(good, tmp_path):
    folder, weights = copied(good[0], tmp_path, 0), dict(good[1])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    refused(folder, tmp_path / "out", "lm_head.weight differs from model.embed_tokens.weight")
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / WEIGHTS)
    import_checkpoint(folder, tmp_path / "out")
    export_checkpoint(tmp_path / "out", tmp_path / "hf")
    assert "lm_head.weight" not in load_file(tmp_path / "hf" / WEIGHTS)
