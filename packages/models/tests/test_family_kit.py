"""The family test kit on families of ours: what it proves, and what it finds."""

import dataclasses
import re

import pytest
from transformers import LlamaConfig, Qwen3MoeConfig

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.plan import Plan
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import RankFailed, check_family, run_ranks
from megatron.bridge.testing.families import expect_same_keys, family_case
from megatron.bridge.testing.key_table import differences
from megatron.bridge.testing.layouts import EXPERT_LAYOUTS, LAYOUTS, layout_fields, ranks_of

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dtype": "float32",
}
MIXTURE = Qwen3MoeConfig(
    **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, mlp_only_layers=[0]
)


def test_a_mixture_of_experts_is_proven_at_expert_layouts_too():
    assert check_family(MIXTURE).keys() == {"single", "tp2", "pp2", "ep2", "etp2"}


def test_a_table_that_names_a_weight_otherwise_than_the_checkpoint_is_found(tmp_path):
    case = family_case(LlamaConfig(**SIZES), tmp_path)

    def renamed():
        bridge = AutoBridge.from_hf_pretrained(case.folder)
        model = bridge.to_megatron_model()
        first, *others = bridge.get_conversion_tasks(model)
        other = dataclasses.replace(first, megatron="embedding.weight")
        return differences(Plan((first, *others)), model), differences(Plan((other, *others)), model)

    same, different = run_ranks(1, renamed)[0]
    assert same == []
    assert different == [
        "only in the table: embedding.weight [256, 64] x 1",
        "only in sharded_state_dict(): embedding.word_embeddings.weight [256, 64] x 1",
    ]


def test_the_key_check_names_family_and_key(tmp_path, monkeypatch):
    case = family_case(LlamaConfig(**SIZES), tmp_path, "small llama")
    # As if checkpoints did not stack layers: the table's numbered names are not their keys then.
    monkeypatch.setattr("megatron.bridge.testing.key_table._INDEX", re.compile("never"))
    with pytest.raises(RankFailed, match=r"small llama: the table and Megatron-Core's checkpoints differ.*layers\.1\."):
        run_ranks(1, expect_same_keys, case)


def test_ranks_of_a_layout():
    assert {name: ranks_of(fields) for name, fields in {**LAYOUTS, **EXPERT_LAYOUTS}.items()} == {
        "single": 1,
        "tp2": 2,
        "pp2": 2,
        "vpp2": 2,
        "tp2pp2": 4,
        "tp4": 4,
        "ep2": 2,
        "etp2": 2,
        "tp2ep2": 4,
        "tp2etp1": 2,
        "tp2ep2etp1": 2,
        "pp2ep2": 4,
        "ep4": 4,
    }
    with pytest.raises(BridgeError, match="no layout is called 'tp3'; did you mean 'tp4' or 'tp2'"):
        layout_fields("tp3")
