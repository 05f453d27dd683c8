"""The offline conversion against the live one, for every family: same checkpoints, same folders, at every layout."""

import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron.bridge import AutoBridge
from megatron.bridge.conversion import dist_checkpoint, sharded_state
from megatron.bridge.conversion.checkpoint_layout import LATEST_POINTER
from megatron.bridge.conversion.integrity import MANIFEST
from megatron.bridge.conversion.megatron_checkpoint import model_state
from megatron.bridge.conversion.offline import export_checkpoint, import_checkpoint
from megatron.bridge.testing import run_ranks, save_random_model

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS = {"single": {}, "tp2": {TP: 2}, "pp2": {PP: 2}, "tp2pp2": {TP: 2, PP: 2}}


def _families():
    """The configurations of `test_families`, so that a new family is tested here too."""
    spec = importlib.util.spec_from_file_location("families", Path(__file__).with_name("test_families.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CONFIGS


CONFIGS = _families()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> (Hugging Face folder, its weights, checkpoint converted offline)"""
    root = tmp_path_factory.mktemp("offline")
    cases = {}
    for name, config in CONFIGS.items():
        weights = save_random_model(config, root / "hf" / name)
        import_checkpoint(root / "hf" / name, root / "offline" / name, workers=2, file_bytes=20_000)
        cases[name] = root / "hf" / name, weights, root / "offline" / name
    return cases


def described(root):
    """Every key of a checkpoint: shape and dtype of tensors, None for objects."""
    metadata = pickle.loads((dist_checkpoint.resolve(root) / ".metadata").read_bytes())
    return {
        key: (tuple(entry.size), entry.properties.dtype) if hasattr(entry, "size") else None
        for key, entry in metadata.state_dict_metadata.items()
    }


def save_live(folders, layout, root):
    for name, (folder, _, _) in folders.items():
        bridge = AutoBridge.from_hf_pretrained(folder)
        bridge.save_megatron_model(bridge.to_megatron_model(**layout), root / name)


def ranks(layout):
    return layout.get(TP, 1) * layout.get(PP, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_are_those_that_a_model_writes(folders, tmp_path, layout):
    sizes = LAYOUTS[layout]
    run_ranks(ranks(sizes), save_live, folders, sizes, tmp_path / "live")
    for name, (folder, weights, single) in folders.items():
        offline = single
        if TP in sizes:
            import_checkpoint(folder, tmp_path / "offline" / name, vocab_multiple=128 * sizes[TP])
        written = tmp_path / "offline" / name if TP in sizes else offline
        assert described(written) == described(tmp_path / "live" / name), name
        # And back, from what ranks of that layout wrote.
        export_checkpoint(tmp_path / "live" / name, tmp_path / "back" / name, workers=2, max_shard_bytes=30_000)
        back = {k: v for file in (tmp_path / "back" / name).glob("*.safetensors") for k, v in load_file(file).items()}
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[key], weights[key]) for key in weights), name


def load_and_export(folders, layout):
    from megatron.core import dist_checkpointing

    for name, (_, weights, offline) in folders.items():
        bridge = AutoBridge.from_megatron_checkpoint(offline)
        model = bridge.load_megatron_model(offline, **layout)
        exported = dict(bridge.export_hf_weights(model))
        assert exported.keys() == weights.keys(), name
        for key, tensor in exported.items():
            assert torch.equal(tensor, weights[key]), f"{name}: {key}"
        # Megatron-Core itself, at its strictest, misses nothing and finds nothing it did not expect.
        state = model_state(model)
        folder = str(dist_checkpoint.resolve(offline))
        dist_checkpointing.load(state, folder, validate_access_integrity=False, strict="raise_all")
    return True


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_load_at_every_layout(folders, layout):
    sizes = LAYOUTS[layout]
    assert all(run_ranks(ranks(sizes), load_and_export, folders, sizes))


def test_a_checkpoint_is_laid_out_as_the_live_one(folders, tmp_path):
    _, _, offline = folders["llama-tied"]
    run_ranks(1, save_live, {"llama-tied": folders["llama-tied"]}, {}, tmp_path)
    live = tmp_path / "llama-tied"
    assert sorted(path.name for path in offline.iterdir()) == sorted(path.name for path in live.iterdir())
    assert (offline / LATEST_POINTER).read_text() == (live / LATEST_POINTER).read_text()
    here, there = dist_checkpoint.resolve(offline), dist_checkpoint.resolve(live)
    for file in (path.relative_to(there) for path in there.rglob("*") if path.is_file()):
        # Digests of files are recorded by live saves only.
        if file.suffix != ".distcp" and file.name not in (".metadata", MANIFEST):
            assert (here / file).read_bytes() == (there / file).read_bytes(), file
    assert sorted(p.name for p in (here / "hf").iterdir()) == sorted(p.name for p in (there / "hf").iterdir())


def test_several_files_by_several_workers_hold_the_same_as_one(folders, tmp_path):
    folder, _, _ = folders["qwen3"]
    trees = []
    for workers in (1, 3):
        root = tmp_path / str(workers)
        import_checkpoint(folder, root / "megatron", workers=workers, file_bytes=10_000)
        export_checkpoint(root / "megatron", root / "hf", workers=workers, max_shard_bytes=20_000)
        trees.append({path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()})
    assert len([path for path in trees[0] if path.suffix == ".distcp"]) > 10
    assert len([path for path in trees[0] if path.suffix == ".safetensors"]) > 10
    assert trees[0] == trees[1]


def save_training(folder, root):
    """A checkpoint as training writes it: optimizer state of every weight beside the weights."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = bridge.to_megatron_model(**{TP: 2})
    state = model_state(model)
    expanded = sharded_state.expanded(model_state(model))
    state["optimizer"] = {
        shard.key + str(index): _renamed(shard, f"optimizer.state.exp_avg.{shard.key}")
        for index, shard in enumerate(expanded)
        if isinstance(shard, ShardedTensor)
    }
    dist_checkpoint.save(root, 7, state, side_files={"hf": folder})


def _renamed(shard, key):
    import dataclasses

    return dataclasses.replace(shard, key=key, data=torch.full_like(shard.data, 7.0))


def test_of_a_training_checkpoint_only_the_weights_are_exported(folders, tmp_path):
    folder, weights, _ = folders["llama"]
    run_ranks(2, save_training, folder, tmp_path / "run")
    assert any(key.startswith("optimizer.") for key in described(tmp_path / "run"))
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    back = load_file(tmp_path / "hf" / "model.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)
