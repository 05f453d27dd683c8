"""Folders that transformers wrote are read, and folders written here are loaded by transformers, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron.bridge.conversion.hf import HFFolderWriter, HFSource, copy_companions


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, dtype=torch.bfloat16,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16()


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_round_trip_through_transformers(tmp_path: Path, model: LlamaForCausalLM, shard_size: str) -> None:
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    source = HFSource(tmp_path / "theirs")
    weights = source.weights
    expected = model.state_dict()
    assert weights.keys() == expected.keys()
    assert (len(weights.files) > 1) == (shard_size == "20KB")
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in expected.items())

    spec = {name: (info.shape, info.dtype) for name, info in weights.items()}
    with HFFolderWriter(tmp_path / "ours", spec, 20_000 if shard_size == "20KB" else 5e9) as writer:
        for name in weights:
            writer.write(name, weights.read(name))
        copy_companions(source.folder, writer.partial)
    # Its annotation does not know of the report.
    load: Any = AutoModelForCausalLM.from_pretrained
    loaded, report = load(tmp_path / "ours", dtype=torch.bfloat16, output_loading_info=True)
    assert not any(report.values())
    loaded_tensors: dict[str, torch.Tensor] = loaded.state_dict()
    assert loaded_tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded_tensors.items())
