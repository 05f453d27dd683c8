"""Mixtures of experts converted offline: the checkpoints and folders that the live conversion gives."""

import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.checkpoint_layout import resolve
from megatron.bridge.conversion.diff import diff
from megatron.bridge.conversion.inspection import inspect_plan
from megatron.bridge.conversion.megatron_checkpoint import model_state
from megatron.bridge.conversion.offline import export_checkpoint, import_checkpoint
from megatron.bridge.conversion.plan import PlanError
from megatron.bridge.conversion.table import WeightTable
from megatron.bridge.models import moe_fragments
from megatron.bridge.models.families.qwen3_moe import Qwen3MoeBridge
from megatron.bridge.testing import random_model, run_ranks, save_random_model

TP, PP, EP, ETP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
LAYOUTS = {"single": (1, {}), "ep2": (2, {EP: 2}), "etp2": (2, {ETP: 2}), "tp2ep2": (4, {TP: 2, EP: 2})}


def _configs(area):
    """The configurations of another test file."""
    spec = importlib.util.spec_from_file_location(area, Path(__file__).with_name(f"test_{area}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CONFIGS


CONFIGS = _configs("moe_families")
# Norms that move to another module from layer to layer, latent attention.
CONFIGS |= {"afmoe": _configs("further_moe_families")["afmoe"], "mla": _configs("latent_families")["deepseek-v3"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> (Hugging Face folder, its weights, checkpoint converted offline)"""
    root = tmp_path_factory.mktemp("offline-experts")
    cases = {}
    for name, config in CONFIGS.items():
        weights = save_random_model(config, root / "hf" / name)
        import_checkpoint(root / "hf" / name, root / "offline" / name, workers=2, file_bytes=50_000)
        cases[name] = root / "hf" / name, weights, root / "offline" / name
    return cases


def described(root):
    """Every key of a checkpoint: shape and dtype of tensors, None for objects."""
    metadata = pickle.loads((resolve(root) / ".metadata").read_bytes())
    return {
        key: (tuple(entry.size), entry.properties.dtype) if hasattr(entry, "size") else None
        for key, entry in metadata.state_dict_metadata.items()
    }


def same(folder, weights):
    found = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    return found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)


def load_and_save(folders, layout, root):
    """In one rank: Megatron-Core loads the offline checkpoint at its strictest; the live conversion writes another."""
    from megatron.core import dist_checkpointing

    for name, (_, weights, offline) in folders.items():
        bridge = AutoBridge.from_megatron_checkpoint(offline)
        model = bridge.load_megatron_model(offline, **layout)
        exported = dict(bridge.export_hf_weights(model))
        assert exported.keys() == weights.keys(), name
        assert all(torch.equal(tensor, weights[key]) for key, tensor in exported.items()), name
        folder = str(resolve(offline))
        dist_checkpointing.load(model_state(model), folder, validate_access_integrity=False, strict="raise_all")
        bridge.save_megatron_model(model, root / name)
    return True


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_checkpoints_as_a_model_writes_and_back(folders, tmp_path, layout):
    ranks, fields = LAYOUTS[layout]
    # Most layouts take but those that differ most: experts in some layers, beside shared ones, with biases.
    chosen = (
        folders if layout == "ep2" else {name: folders[name] for name in ("qwen2-moe-mixed", "glm4-moe", "mixtral")}
    )
    assert all(run_ranks(ranks, load_and_save, chosen, fields, tmp_path / "live"))
    for name, (_, weights, offline) in chosen.items():
        if TP not in fields:  # which pads the vocabulary otherwise
            assert described(offline) == described(tmp_path / "live" / name), name
        for source in (offline, tmp_path / "live" / name):
            export_checkpoint(source, tmp_path / "back" / name, max_shard_bytes=100_000, overwrite=True)
            assert same(tmp_path / "back" / name, weights), name


def test_routing_biases_stay_in_fp32(tmp_path):
    config = type(CONFIGS["dots1"])(**{**CONFIGS["dots1"].to_dict(), "dtype": "bfloat16"})
    weights = save_random_model(config, tmp_path / "hf")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    weights |= {name: torch.rand(8) for name in weights if name.endswith("e_score_correction_bias")}
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    assert described(tmp_path / "megatron")["decoder.layers.1.mlp.router.expert_bias"] == ((8,), torch.float32)
    assert diff(tmp_path / "hf", tmp_path / "megatron").same
    export_checkpoint(tmp_path / "megatron", tmp_path / "half", dtype=torch.float16)
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert half["lm_head.weight"].dtype == torch.float16
    assert torch.equal(half[bias], weights[bias])


def test_stacked_experts_become_the_same_checkpoint(folders, tmp_path, monkeypatch):
    folder, _, single = folders["qwen3-moe"]
    state = random_model(CONFIGS["qwen3-moe"]).state_dict()
    for file in folder.glob("*.json"):
        (tmp_path / "hf").mkdir(exist_ok=True)
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    save_file(state, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    mlp = "model.layers.{l}.mlp"
    stacked = moe_fragments.stacked_experts(f"{mlp}.experts.gate_up_proj", f"{mlp}.experts.down_proj")
    table = Qwen3MoeBridge.mapping_registry

    def with_stacked(self):
        return WeightTable((*(rule for rule in table(self).rules if "{e}" not in rule.megatron), *stacked))

    monkeypatch.setattr(Qwen3MoeBridge, "mapping_registry", with_stacked)
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron", file_bytes=50_000)
    assert described(tmp_path / "megatron") == described(single)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=200_000, workers=2)
    assert same(tmp_path / "back", state)
    # Either spelling of the source comes out of either checkpoint.
    export_checkpoint(single, tmp_path / "stacked")
    assert same(tmp_path / "stacked", state)
    assert diff(tmp_path / "hf", single).same
    assert [row.nbytes for row in inspect_plan(tmp_path / "hf")] == [row.nbytes for row in inspect_plan(single)]


def refused(folder, target, culprit):
    with pytest.raises(PlanError, match=culprit):
        import_checkpoint(folder, target)
    assert not target.exists()


def changed(folder, target, weights, config=None):
    target.mkdir()
    for file in folder.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    (config or AutoBridge.from_hf_pretrained(folder).hf_config).save_pretrained(target)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


def test_experts_that_the_configuration_does_not_describe_are_refused(folders, tmp_path):
    folder, weights, _ = folders["dots1"]
    first = {name: tensor for name, tensor in weights.items() if ".experts.3." not in name}
    refused(changed(folder, tmp_path / "gap", first), tmp_path / "out", r"layer 1 lacks experts 3 of")
    more = {n.replace("experts.7.", "experts.8."): t.clone() for n, t in weights.items() if ".experts.7." in n}
    refused(changed(folder, tmp_path / "more", {**weights, **more}), tmp_path / "out", r"layer 1 has experts 8 of")
    config = AutoBridge.from_hf_pretrained(folder).hf_config
    config.first_k_dense_replace = 2
    other = changed(folder, tmp_path / "dense", weights, config)
    refused(other, tmp_path / "out", r"layers \[1, 2, 3\] hold experts, the configuration says \[2, 3\]")
    config = AutoBridge.from_hf_pretrained(folder).hf_config
    config.moe_intermediate_size = 48
    refused(changed(folder, tmp_path / "wide", weights, config), tmp_path / "out", "moe_ffn_hidden_size is 48")


@pytest.mark.parametrize(("name", "culprit"), [("mamba2", r"mixer\.in_proj"), ("qwen3.5", r"self_attention\.in_proj")])
def test_weights_that_megatron_core_stores_in_parts_are_refused(tmp_path, name, culprit):
    save_random_model(_configs("hybrid_families")[name], tmp_path / "hf")
    refused(tmp_path / "hf", tmp_path / "out", rf"{culprit}.*cannot place; convert without --offline")
