"""A Hugging Face folder in each checkpoint: whole, of that very step, and gone with it."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from megatron.bridge.conversion.auto_bridge import AutoBridge
from megatron.bridge.conversion.checkpoint_layout import iteration_folder, saved_iterations
from megatron.bridge.conversion.hf import HFFolderWriter
from megatron.bridge.conversion.integrity import recorded_digests, wrong_files
from megatron.bridge.conversion.logits import megatron_logits
from megatron.bridge.errors import BridgeError
from megatron.bridge.peft import LoRA
from megatron.bridge.testing import run_ranks, save_random_model
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

CONFIG = LlamaConfig(
    num_hidden_layers=2,
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
TOKENS = torch.arange(48).view(2, 24)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_random_model(CONFIG, folder)
    return folder


class Logits(Callback):
    """What the model answers at each save."""

    def __init__(self) -> None:
        self.held: list[torch.Tensor] = []

    def on_step_end(self, run: Any, result: Any) -> None:
        self.held.append(megatron_logits(run.model, TOKENS)[..., : CONFIG.vocab_size].detach())
        for chunk in run.model:
            chunk.train()


def _run(make_run: Callable[..., Any], hf_folder: Path, save: Path, **settings: Any) -> Any:
    cfg = make_run(save=str(save), save_interval=1, save_hf=True, **({"train_iters": 3} | settings))
    cfg.model = AutoBridge.from_hf_pretrained(hf_folder).to_megatron_provider()
    cfg.model.tensor_model_parallel_size, cfg.model.seq_length = 2, 16
    return cfg


@pytest.mark.parametrize(
    ("in_background", "adapter"), [(False, False), (True, False), (False, True)], ids=["at once", "behind", "adapter"]
)
def test_each_checkpoint_holds_its_step_for_transformers(
    in_background: bool, adapter: bool, hf_folder: Path, make_run: Callable[..., Any], tmp_path: Path
) -> None:
    root = tmp_path / "run"

    def work() -> list[torch.Tensor]:
        logits = Logits()
        cfg = _run(make_run, hf_folder, root, most_recent_k=2, async_save=in_background)
        cfg.peft = LoRA(dim=4, alpha=8) if adapter else None
        pretrain(cfg, forward_step, [logits])
        return logits.held

    logits = run_ranks(2, work, timeout=120)[0]
    assert sorted(each.name for each in root.iterdir() if each.is_dir()) == ["iter_0000002", "iter_0000003"]
    for iteration in (2, 3):
        folder = iteration_folder(root, iteration)
        assert not wrong_files(folder)
        assert "hf/model.safetensors" in recorded_digests(folder)
        assert {each.name for each in hf_folder.iterdir()} <= {each.name for each in (folder / "hf").iterdir()}
        assert not torch.allclose(logits[iteration - 1], logits[iteration - 2], atol=1e-4)
        model = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS).logits, logits[iteration - 1], rtol=0, atol=1e-5)


def test_a_run_that_goes_on_without_them_copies_no_old_weights(
    hf_folder: Path, make_run: Callable[..., Any], tmp_path: Path
) -> None:
    def work() -> None:
        pretrain(_run(make_run, hf_folder, tmp_path, train_iters=1), forward_step)
        cfg = _run(make_run, hf_folder, tmp_path, train_iters=2, load=str(tmp_path))
        cfg.model.bridge, cfg.checkpoint.save_hf = None, False
        pretrain(cfg, forward_step)

    run_ranks(2, work, timeout=120)
    first, second = (iteration_folder(tmp_path, iteration) / "hf" for iteration in (1, 2))
    assert load_file(first / "model.safetensors")
    assert (second / "config.json").is_file()
    assert not list(second.glob("*.safetensors"))


def test_a_folder_that_cannot_be_written_is_a_save_that_failed(
    hf_folder: Path, make_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full: once at step 1, each time at step 2."""
    tried: list[str] = []
    write = HFFolderWriter.write

    def full(self: Any, name: str, tensor: Any) -> None:
        step = self.partial.parent.name.split("_")[1].split(".")[0]
        if name == "model.norm.weight":
            tried.append(step)
            if int(step) == 2 or tried == [step]:
                raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, tensor)

    def work() -> list[str]:
        monkeypatch.setattr(HFFolderWriter, "write", full)
        cfg = _run(make_run, hf_folder, tmp_path / "run", save_retries=1, go_on_without=True)
        pretrain(cfg, forward_step)
        return tried

    tries = [[int(step) for step in each] for each in run_ranks(2, work, timeout=120)]
    assert [1, 1, 2, 2, 3] in tries
    assert saved_iterations(tmp_path / "run") == [1, 3]
    assert not list((tmp_path / "run").glob(".*"))


def test_it_is_refused_where_nobody_knows_the_hugging_face_model(make_run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match=r"checkpoint\.save_hf is set, and nothing tells which Hugging Face model"):
        make_run(save=str(tmp_path / "run"), save_hf=True).validate(1)
    with pytest.raises(BridgeError, match=r"checkpoint\.save_hf is set, but checkpoint\.save is not"):
        make_run(save_hf=True).validate(1)
