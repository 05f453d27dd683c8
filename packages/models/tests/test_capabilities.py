"""The capability record: what it says of a layout, the notice when it is silent, and the command that shows it."""

import json
import logging
import subprocess
import sys

import pytest
from click.testing import CliRunner
from transformers import LlamaConfig

from megatron.bridge import AutoBridge
from megatron.bridge.errors import BridgeError
from megatron.bridge.models.capabilities import (
    RECORD,
    Record,
    _tell,
    kinds,
    missing_proof,
    read_record,
    shipped_record,
)
from megatron.bridge.models.capability_command import models
from megatron.bridge.testing import run_ranks, save_random_model

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, set()),
        ({TP: 1, PP: 1, EP: 1, ETP: None}, set()),
        ({TP: 8, ETP: 8}, {"tensor"}),
        ({TP: 8, EP: 4, ETP: 1}, {"tensor", "expert", "expert tensor"}),
        ({PP: 2, "virtual_pipeline_model_parallel_size": 4}, {"pipeline", "virtual pipeline"}),
        ({TP: 2, "sequence_parallel": True, CP: 2}, {"tensor", "sequence", "context"}),
    ],
)
def test_kinds_of_parallelism(fields, expected):
    assert kinds(fields) == expected


def test_what_is_in_the_record_needs_no_notice():
    assert missing_proof("LlamaForCausalLM", {}) is None
    assert missing_proof("LlamaForCausalLM", {TP: 8, PP: 4}, "torch") is None
    assert missing_proof("MixtralForCausalLM", {EP: 8}) is None


def test_what_the_record_lacks_is_told():
    assert "LlamaForCausalLM at context x tensor parallelism is not in the" in missing_proof(
        "LlamaForCausalLM", {TP: 2, CP: 2}
    )
    assert "AcmeForCausalLM is not in the capability record" in missing_proof("AcmeForCausalLM", {})
    assert "layer spec 'local' is not in the record, only 'torch'" in missing_proof("LlamaForCausalLM", {}, "local")


def build(folder, **options):
    """In a rank: what is logged while a model is built twice."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda entry: lines.append((entry.levelname, entry.getMessage()))
    logging.getLogger("megatron.bridge.models.capabilities").addHandler(handler)
    _tell.cache_clear()
    bridge = AutoBridge.from_hf_pretrained(folder)
    for _ in range(2):
        bridge.to_megatron_model(**options)
    return lines


def test_building_what_the_record_lacks_says_so_once_and_on_one_rank(tmp_path):
    config = LlamaConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        dtype="float32",
    )
    save_random_model(config, tmp_path)
    assert run_ranks(1, build, tmp_path) == [[]]
    first, second = run_ranks(2, lambda: build(tmp_path, layer_spec="local", **{TP: 2}))
    assert second == []
    ((level, text),) = first
    assert level == "WARNING"
    assert "LlamaForCausalLM with layer spec 'local' is not in the record" in text
    assert "megatron-bridge verify" in text


def test_a_record_of_another_format_is_refused(tmp_path):
    held = json.loads(RECORD.read_text())
    for damaged in ("{", json.dumps(held | {"format": 0}), json.dumps({"format": 1}), json.dumps([])):
        (tmp_path / "record.json").write_text(damaged)
        with pytest.raises(BridgeError, match=r"record\.json .*just zoo"):
            read_record(tmp_path / "record.json")


def test_the_record_is_written_as_it_is_read():
    record = read_record()
    assert isinstance(record, Record)
    assert record.to_text() == RECORD.read_text()


def invoke(*arguments):
    return CliRunner().invoke(models, arguments)


def test_every_offered_architecture_is_listed():
    listed = invoke()
    assert listed.exit_code == 0
    for name in AutoBridge.list_supported_models():
        assert name in listed.output


@pytest.mark.parametrize("name", ["Qwen2Moe", "qwen2moeforcausallm", "Qwen2MoeForCausalLM"])
def test_one_architecture_with_its_layouts(name):
    shown = invoke(name)
    assert shown.output.startswith("Qwen2MoeForCausalLM")
    capability = shipped_record().architectures["Qwen2MoeForCausalLM"]
    for layout, difference in capability.layouts.items():
        assert f"{layout:<11} {difference:.1e}" in shown.output
    assert all(case in shown.output for case in capability.cases)


def test_json_is_the_record():
    held = json.loads(invoke("GPT2", "--json").output)
    assert held.keys() == {"GPT2LMHeadModel"}
    assert held["GPT2LMHeadModel"]["proven"]["layouts"] == shipped_record().architectures["GPT2LMHeadModel"].layouts
    assert held["GPT2LMHeadModel"]["offered_by"].startswith("megatron-bridge-models")


def test_an_unknown_name_gets_near_ones():
    refused = invoke("Quen2")
    assert isinstance(refused.exception, BridgeError)
    assert "no architecture is called 'Quen2'; did you mean 'Qwen2'" in str(refused.exception)


def test_the_command_imports_nothing_heavy():
    program = (
        "import sys; from megatron.bridge.cli.root import run; assert run(['models', 'Llama']) == 0;"
        "print({'torch', 'numpy', 'transformers', 'megatron.core'} & sys.modules.keys())"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], text=True, timeout=120)
    assert printed.splitlines()[-1] == "set()"
