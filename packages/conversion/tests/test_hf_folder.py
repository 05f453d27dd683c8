"""What is copied beside the weights: everything a complete folder has, and never weights."""

import json
from pathlib import Path

import pytest

from megatron.bridge.conversion.hf import HFFolderError, companion_files, copy_companions, write_config

COMPANIONS = (
    "LICENSE",
    "README.md",
    "added_tokens.json",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "config.json",
    "configuration_tiny.py",
    "generation_config.json",
    "merges.txt",
    "modeling/attention.py",
    "modeling/kernels/fused.py",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
LEFT_OUT = (
    ".gitattributes",
    ".cache/huggingface/x.json",
    "__pycache__/configuration_tiny.cpython-312.pyc",
    "consolidated.safetensors",
    "flax_model.msgpack",
    "ggml-model-q4.BIN",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors.partial",
    "model.Q4_K_M.gguf",
    "model.onnx",
    "model.safetensors",
    "model.safetensors.index.json",
    "modeling/__pycache__/attention.cpython-312.pyc",
    "modeling/table.pt",
    "onnx/model.onnx_data",
    "original/consolidated.00.pth",
    "original/params.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "trainer_state.json",
    "training_args.bin",
)


def fill(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"contents of {name}")
    return folder


def test_every_companion_and_no_weights(tmp_path: Path) -> None:
    fill(tmp_path, COMPANIONS + LEFT_OUT)
    assert [str(file) for file in companion_files(tmp_path)] == sorted(COMPANIONS)


def test_large_files_of_unknown_kind_are_taken_for_weights(tmp_path: Path) -> None:
    fill(tmp_path, ("config.json", "tokenizer.json", "weights.newformat", "speech.tok"))
    for name in ("tokenizer.json", "weights.newformat"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(65 * 2**20)
    assert {file.name for file in companion_files(tmp_path)} == {"config.json", "tokenizer.json", "speech.tok"}


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, ("tokenizer.json",))
    with pytest.raises(HFFolderError, match=r"has no config\.json"):
        companion_files(tmp_path)


def test_copies_have_the_contents_also_of_links(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", COMPANIONS)
    # A hub cache keeps the contents under their hashes, and links to them.
    (tmp_path / "blob").write_text("linked")
    (source / "vocab.json").unlink()
    (source / "vocab.json").symlink_to(tmp_path / "blob")
    (tmp_path / "target").mkdir()
    copied = copy_companions(source, tmp_path / "target")
    assert copied == companion_files(source) == companion_files(tmp_path / "target")
    assert all((tmp_path / "target" / file).read_bytes() == (source / file).read_bytes() for file in copied)
    assert not (tmp_path / "target" / "vocab.json").is_symlink()
    assert copy_companions(source, tmp_path / "target") == copied


def test_a_file_that_differs_is_not_overwritten(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", ("config.json", "a.txt"))
    (tmp_path / "target").mkdir()
    write_config(tmp_path / "target", {"mine": True})
    with pytest.raises(HFFolderError, match=r"other files of the same name.*\n  config\.json"):
        copy_companions(source, tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["config.json"]


def test_copying_to_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", ("config.json",))
    (tmp_path / "target").touch()
    with pytest.raises(HFFolderError, match="cannot be copied"):
        copy_companions(source, tmp_path / "target")


def test_config_is_replaced(tmp_path: Path) -> None:
    fill(tmp_path, ("config.json",))
    config = {"architectures": ["LlamaForCausalLM"], "name": "café", "limit": [0.0, float("inf")]}
    assert write_config(tmp_path, config) == tmp_path / "config.json"
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_config_value_without_json_form_is_named_and_the_old_file_kept(tmp_path: Path) -> None:
    fill(tmp_path, ("config.json",))
    with pytest.raises(HFFolderError, match=r"\n  bad = \{1, 2\}"):
        write_config(tmp_path, {"good": 1, "bad": {1, 2}})
    assert (tmp_path / "config.json").read_text() == "contents of config.json"
    with pytest.raises(HFFolderError, match="cannot be written"):
        write_config(tmp_path / "nowhere", {})
