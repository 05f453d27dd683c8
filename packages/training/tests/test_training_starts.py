"""What a run starts from: a Hugging Face folder, a Megatron-LM checkpoint, a chosen iteration; and what it leaves."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from megatron.bridge.conversion.auto_bridge import AutoBridge
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import RankFailed, run_ranks, save_random_model
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

CONFIG = LlamaConfig(
    num_hidden_layers=4,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    architectures=["LlamaForCausalLM"],
    dtype="float32",
)
TP = {"tensor_model_parallel_size": 2}


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_random_model(CONFIG, folder)
    return folder


class Weights(Callback):
    """Keeps the weights that the run starts with, under their Hugging Face names."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_train_start(self, run: Any) -> None:
        bridge = AutoBridge.from_hf_config(CONFIG)
        self.found = {name: value.clone() for name, value in bridge.export_hf_weights(run.model)}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def _started_from(path: Path, make_run: Callable[..., Any], **settings: Any) -> tuple[dict[str, torch.Tensor], Any]:
    weights, cfg = Weights(), make_run(TP, train_iters=2, pretrained_checkpoint=str(path), **settings)
    provider = AutoBridge.from_hf_config(CONFIG).to_megatron_provider()
    cfg.model = provider
    provider.tensor_model_parallel_size, provider.seq_length, provider.bridge = 2, 16, None
    result = pretrain(cfg, forward_step, [weights])
    return weights.found, result


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_starts_from_a_hugging_face_folder_and_leaves_one(
    hf_folder: Path, make_run: Callable[..., Any], tmp_path: Path
) -> None:
    def work() -> Any:
        place = {"save": str(tmp_path / "run"), "hf_save_path": str(tmp_path / "trained")}
        found, result = _started_from(hf_folder, make_run, **place)
        bridge = AutoBridge.from_megatron_checkpoint(tmp_path / "run")
        bridge.export_ckpt(tmp_path / "run", tmp_path / "exported")
        return _same(found, _weights(hf_folder)), result.iteration

    assert run_ranks(2, work) == [(True, 2)] * 2
    trained = _weights(tmp_path / "trained")
    assert _same(trained, _weights(tmp_path / "exported"))
    assert not _same(trained, _weights(hf_folder))
    assert {file.name for file in hf_folder.iterdir()} <= {file.name for file in (tmp_path / "trained").iterdir()}
    with pytest.raises(BridgeError, match=r"nothing tells which Hugging Face[\s\S]*trained': it is there already"):
        make_run(hf_save_path=str(tmp_path / "trained")).validate(1)


def test_a_run_starts_from_a_megatron_lm_checkpoint(
    hf_folder: Path, make_run: Callable[..., Any], tmp_path: Path
) -> None:
    """As Megatron-LM writes it: its arguments, optimizer and random state beside the weights."""

    def write() -> None:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

        from megatron.bridge.conversion.checkpoint_save import save_strategy
        from megatron.bridge.conversion.megatron_checkpoint import model_state

        state = model_state(AutoBridge.from_hf_pretrained(hf_folder).to_megatron_model())
        moment = torch.ones(3)
        state |= {
            "args": argparse.Namespace(num_layers=4),
            "checkpoint_version": 3.0,
            "iteration": 7,
            "optimizer": {"m": ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.x", moment)},
            "rng_state": ShardedObject("rng_state", [{"random": 1}], (1, 1), (0, 0)),
            "rerun_state_machine_state": ShardedObject("rerun_state_machine_state", {"mode": 1}, (1,), (0,)),
        }
        (tmp_path / "iter_0000007").mkdir()
        dist_checkpointing.save(state, str(tmp_path / "iter_0000007"), save_strategy()())
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")

    run_ranks(1, write)
    found, result = run_ranks(2, _started_from, tmp_path, make_run)[0]
    assert _same(found, _weights(hf_folder))
    assert min(result.losses) == 1  # a fresh run


def test_a_hugging_face_model_of_other_sizes_is_refused(make_run: Callable[..., Any], tmp_path: Path) -> None:
    other = LlamaConfig(**(CONFIG.to_dict() | {"intermediate_size": 96}))
    save_random_model(other, tmp_path)
    told = r"pretrained_checkpoint: .* is of another model: ffn_hidden_size is 64 in cfg.model and 96 there; make"
    with pytest.raises(RankFailed, match=told):
        run_ranks(2, _started_from, tmp_path, make_run)


def test_a_checkpoint_of_another_model_is_refused_by_its_configuration(
    make_run: Callable[..., Any], tmp_path: Path
) -> None:
    run_ranks(1, lambda: pretrain(make_run(train_iters=1, save=str(tmp_path)), forward_step).loss, timeout=60)
    # The weights of this one have the very same shapes.
    other = {"num_attention_heads": 2, "num_query_groups": 1}
    told = "is of another model: " + ", ".join(
        f"{name} is {here} in cfg.model and {there} there"
        for name, here, there in (("kv_channels", 16, 8), ("num_attention_heads", 2, 4), ("num_query_groups", 1, 2))
    )
    for setting in ("load", "pretrained_checkpoint"):
        make_run(**{setting: str(tmp_path)}).validate(1)
        with pytest.raises(BridgeError, match=f"checkpoint.{setting}: .*iter_0000001 {told}"):
            make_run(other, **{setting: str(tmp_path)}).validate(1)


def test_a_run_resumes_from_a_chosen_iteration(make_run: Callable[..., Any], tmp_path: Path) -> None:
    def work() -> tuple[dict[int, float], dict[int, float]]:
        whole = pretrain(make_run(train_iters=4, save=str(tmp_path / "run"), save_interval=1), forward_step)
        cfg = make_run(train_iters=4, load=str(tmp_path / "run"), ckpt_step=2)
        return whole.losses, pretrain(cfg, forward_step).losses

    whole, rest = run_ranks(1, work)[0]
    assert rest == {step: whole[step] for step in (3, 4)}
    with pytest.raises(BridgeError, match=r"checkpoint\.load: .*iter_0000007.* does not exist"):
        make_run(load=str(tmp_path / "run"), ckpt_step=7).validate(1)
    with pytest.raises(BridgeError, match=r"checkpoint\.ckpt_step is set, but checkpoint\.load is not"):
        make_run(ckpt_step=7).validate(1)
