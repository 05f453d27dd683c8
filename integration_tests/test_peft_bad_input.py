"""Adapters that do not fit, cannot be represented or cannot be read: refused by name, and the model stays as it was."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from small_models import save_small_llama
from transformers import AutoModelForCausalLM

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.adapters import adapted
from megatron.bridge.errors import BridgeError
from megatron.bridge.peft import CanonicalLoRA, LoRA
from megatron.bridge.testing import run_ranks


def _adapter(base: Path, folder: Path, **settings: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft.get_peft_model(
        model, peft.LoraConfig(**({"r": 2, "target_modules": ["q_proj", "o_proj"]} | settings))
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """name -> the folder, and what must be told."""
    root = tmp_path_factory.mktemp("adapters")
    save_small_llama(root / "base", tie_word_embeddings=False)
    save_small_llama(root / "wide", tie_word_embeddings=False, hidden_size=96)
    save_small_llama(root / "deep", tie_word_embeddings=False, num_hidden_layers=3)
    good = _adapter(root / "base", root / "good")

    def changed(name: str, **values: Any) -> Path:
        shutil.copytree(good, root / name)
        config = json.loads((good / "adapter_config.json").read_text()) | values
        (root / name / "adapter_config.json").write_text(json.dumps(config))
        return root / name

    cut = changed("cut")
    (cut / "adapter_model.safetensors").write_bytes((good / "adapter_model.safetensors").read_bytes()[:-40])
    bare = changed("bare")
    (bare / "adapter_model.safetensors").unlink()
    return {
        "wide": (_adapter(root / "wide", root / "of wide"), r"layers.0.self_attn.q_proj.lora_A.weight \[2, 96\]"),
        "deep": (_adapter(root / "deep", root / "of deep"), r"model.layers.2.self_attn.q_proj"),
        "bias": (_adapter(root / "base", root / "of bias", lora_bias=True), "lora_bias=True"),
        "features": (
            changed("features", modules_to_save=["lm_head"], use_qalora=True),
            "modules_to_save=.*use_qalora=True",
        ),
        "kind": (changed("kind", peft_type="LOHA"), "'LOHA'"),
        "rank": (changed("rank", r=0), "dim=0 must be at least 1"),
        "other rank": (changed("other rank", r=3), r"\[2, 64\].*\[3, 64\]"),
        "cut": (cut, "adapter_model.safetensors cannot be read"),
        "bare": (bare, "adapter_model.safetensors cannot be read"),
        "nothing": (root / "nothing", "adapter_config.json cannot be read"),
        "good": (good, ""),
    }


def test_each_is_refused_and_the_model_stays(cases: dict[str, tuple[Path, str]]) -> None:
    base = cases["good"][0].parent / "base"

    def work() -> dict[str, str]:
        bridge = AutoBridge.from_hf_pretrained(base)
        model = bridge.to_megatron_model()
        before = {name: tensor.clone() for name, tensor in bridge.export_hf_weights(model)}
        told = {}
        for name, (folder, message) in cases.items():
            if message:
                try:
                    bridge.load_hf_adapter(model, folder)
                except BridgeError as error:
                    told[name] = str(error)
            assert not [each for each in adapted(model) if each.layer.adapters], name
        after = dict(bridge.export_hf_weights(model))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
        with pytest.raises(BridgeError, match="has no adapters"):
            bridge.save_hf_adapter(model, base.parent / "never")
        bridge.load_hf_adapter(model, cases["good"][0])
        assert len(adapted(model)) == 4
        return told

    import re

    (told,) = run_ranks(1, work, timeout=100)
    for name, (_, message) in cases.items():
        if message:
            assert re.search(message, told.get(name, ""), re.DOTALL), (name, told.get(name))


def test_parts_of_fused_layers(cases: dict[str, tuple[Path, str]]) -> None:
    base = cases["good"][0].parent / "base"

    def work() -> list[str]:
        model = AutoBridge.from_hf_pretrained(base).to_megatron_model()
        with pytest.raises(BridgeError, match="names only some of them; name k_proj, v_proj too, or use CanonicalLoRA"):
            LoRA(target_modules=["q_proj"])(model)
        with pytest.raises(BridgeError, match=r"target_modules=\['q_porj'\]; did you mean 'q_proj'"):
            LoRA(target_modules=["o_proj", "q_porj"])(AutoBridge.from_hf_pretrained(base).to_megatron_model())
        method = CanonicalLoRA(
            target_modules=["q_proj", "v_proj", "gate_proj"], exclude_modules=["model.layers.0.*"], dim=2
        )
        model = AutoBridge.from_hf_pretrained(base).to_megatron_model()
        method(model)
        return sorted(name for name, each in model[0].named_parameters() if each.requires_grad)

    (trained,) = run_ranks(1, work, timeout=60)
    place = "decoder.layers.1"
    assert trained == sorted(
        [f"{place}.mlp.linear_fc1.adapters.default.gate_proj_lora_{side}" for side in "AB"]
        + [
            f"{place}.self_attention.linear_qkv.adapters.default.{part}_proj_lora_{side}"
            for part in "qv"
            for side in "AB"
        ]
    )


def test_an_adapter_on_tied_embeddings_is_not_merged(tmp_path: Path) -> None:
    save_small_llama(tmp_path / "base")

    def work() -> None:
        bridge = AutoBridge.from_hf_pretrained(tmp_path / "base")
        model = bridge.to_megatron_model()
        LoRA(target_modules=["embed_tokens"], dim=2)(model)
        with pytest.raises(BridgeError, match="'embedding.word_embeddings' cannot be merged"):
            list(bridge.export_hf_weights(model))
        assert bridge.save_hf_adapter(model, tmp_path / "adapter").is_dir()

    run_ranks(1, work, timeout=60)
