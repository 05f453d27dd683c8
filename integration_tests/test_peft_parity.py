"""Adapters made by Hugging Face peft compute, learn and come back here as they do there, at every parallel layout."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from megatron.bridge.testing import import_engine, save_random_model
from megatron.bridge.testing.adapters import (
    DENSE_LAYOUTS,
    EXPERT_LAYOUTS,
    AdapterCase,
    AdapterResult,
    adapter_case,
    expect_merged,
    expect_same_file,
    expect_that_peft_loads,
    expect_what_peft_computes,
    run_adapters,
)

_SHARED: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}
MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SHARED, architectures=["LlamaForCausalLM"]),
    "qwen3 moe": Qwen3MoeConfig(
        **_SHARED,
        architectures=["Qwen3MoeForCausalLM"],
        head_dim=8,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
    ),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
METHODS: dict[str, dict[str, peft.PeftConfig]] = {
    "llama": {
        "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=[*ATTENTION, *MLP, "lm_head", "embed_tokens"]),
        "lora on q and v": peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"]),
        "lora of two ranks": peft.LoraConfig(
            r=4, rank_pattern={"o_proj": 2}, alpha_pattern={"layers.0.mlp.up_proj": 3}, target_modules=["o_proj", *MLP]
        ),
        "dora": peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=[*ATTENTION, *MLP]),
        "ia3": peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj", "up_proj"], feedforward_modules=["down_proj"]
        ),
    },
    "qwen3 moe": {
        "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, target_parameters=EXPERTS),
        "lora on half of the experts": peft.LoraConfig(r=2, target_modules=["o_proj"], target_parameters=EXPERTS[:1]),
        "lora shared by the experts": peft.LoraConfig(r=2, target_modules=["o_proj"], target_parameters=EXPERTS[:2]),
        "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=ATTENTION),
        "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    },
}
LAYOUTS = {"llama": DENSE_LAYOUTS, "qwen3 moe": EXPERT_LAYOUTS}
CASES = [(model, layout) for model, layouts in LAYOUTS.items() for layout in layouts]
type Results = dict[tuple[str, str], dict[str, AdapterResult]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import_engine("megatron.bridge.models.gpt_provider", "megatron.bridge.peft.weight_decomposed")
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("bases")
    for name, config in MODELS.items():
        save_random_model(config, root / name)
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[AdapterCase]]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: [
            adapter_case(kind, MODELS[name], method, root / name / kind, tie_experts="shared" in kind)
            for kind, method in methods.items()
        ]
        for name, methods in METHODS.items()
    }


@pytest.fixture(scope="module")
def results(
    folders: dict[str, Path], references: dict[str, list[AdapterCase]], tmp_path_factory: pytest.TempPathFactory
) -> Results:
    out = tmp_path_factory.mktemp("exports")
    return {
        (model, layout): run_adapters(folders[model], layout, references[model], out / model / layout)
        for model, layout in CASES
    }


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_logits_gradients_and_losses_are_those_of_peft(
    model: str, layout: str, results: Results, references: dict[str, list[AdapterCase]]
) -> None:
    for case in references[model]:
        expect_what_peft_computes(case, results[model, layout][case.name])


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_an_adapter_comes_back_bit_for_bit(
    model: str, layout: str, results: Results, references: dict[str, list[AdapterCase]]
) -> None:
    for case in references[model]:
        expect_same_file(case, results[model, layout][case.name])


@pytest.mark.parametrize("model", list(MODELS))
def test_peft_loads_what_was_written(model: str, results: Results, references: dict[str, list[AdapterCase]]) -> None:
    for case in references[model]:
        expect_that_peft_loads(case, results[model, LAYOUTS[model][1]][case.name])


@pytest.mark.parametrize(("model", "layout"), [("llama", "tp2"), ("qwen3 moe", "ep2")])
def test_merged_weights_compute_what_the_adapter_does(
    model: str,
    layout: str,
    results: Results,
    references: dict[str, list[AdapterCase]],
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    for case in references[model]:
        expect_merged(case, results[model, layout][case.name], folders[model], tmp_path / case.name)


def test_targets_are_written_short(results: Results) -> None:
    config = json.loads((results["llama", "tp2"]["lora on q and v"].saved / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, True)
    config = json.loads((results["qwen3 moe", "ep2"]["lora"].saved / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj", "gate.weight"]
