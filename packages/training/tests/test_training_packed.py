"""Packed documents train as the same documents do one by one: losses, gradients and weights, at every layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge.conversion import dist_checkpoint
from megatron.bridge.data.tokenizers import train_bpe_tokenizer
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import run_ranks
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import SFTDatasetConfig, TokenizerConfig
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

LENGTH, ROWS, STEPS = 64, 16, 2
TOLERANCE = 1e-5

TP, PP, CP = ({f"{kind}_parallel_size": 2} for kind in ("tensor_model", "pipeline_model", "context"))
SP = TP | {"sequence_parallel": True}
LEARNED = {"position_embedding_type": "learned_absolute"}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one rank": {}, "learned positions": LEARNED},
    2: {"CP2": CP, "PP2": PP, "TP2 + SP": SP, "CP2, learned": CP | LEARNED},
    4: {"PP4": {"pipeline_model_parallel_size": 4}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes and 16 rows of different lengths."""
    folder = tmp_path_factory.mktemp("packed")
    train_bpe_tokenizer(["a"], 259, folder / "tokenizer")
    rows = [{"prompt": "ab" * (1 + at % 5), "completion": chr(97 + at) * (1 + at * 7 % 23)} for at in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Gradients(Callback):
    """The gradient of the first step by name, layers counted over all stages."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_gradients(self, run: Any) -> None:
        for chunk in run.model if not self.found else ():
            model = chunk.module
            offset = model.decoder.layers[0].layer_number - 1
            for name, parameter in model.named_parameters():
                parts = name.split(".")
                if parts[:2] == ["decoder", "layers"]:
                    parts[2] = str(int(parts[2]) + offset)
                self.found[".".join(parts)] = parameter.main_grad.clone()


class Blind(Callback):
    """Takes the documents' bounds away."""

    def on_batch(self, run: Any, batch: dict[str, torch.Tensor]) -> None:
        del batch["cu_seqlens"]


@pytest.fixture(scope="module")
def runs(make_run: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """name -> losses, norms, first gradients by rank, and the weights at the end; "separate ..." is one by one."""

    def configured(model: dict[str, Any], packing: bool, **settings: Any) -> Any:
        model = {"vocab_size": 288, "seq_length": LENGTH, "calculate_per_token_loss": True} | model
        cfg = make_run(model, train_iters=STEPS, lr_warmup_iters=0, **settings)
        cfg.tokenizer = TokenizerConfig(tokenizer_model=str(folder / "tokenizer"))
        cfg.dataset = SFTDatasetConfig(
            data_paths=[str(folder / "rows.jsonl")],
            split="100,0,0",
            dataset_format="prompt_completion",
            prompt_template="plain",
            sequence_length=LENGTH,
            packing=packing,
        )
        cfg.train.global_batch_size = ROWS
        return cfg

    def train(name: str, model: dict[str, Any], packing: bool) -> dict[str, Any]:
        start = str(folder / ("learned" if "position_embedding_type" in model else "rotary"))
        cfg = configured(model, packing, save=str(folder / name), pretrained_checkpoint=start)
        if packing:
            from megatron.bridge.training.data import build_datasets

            # Each step sees every document once, packed or not.
            cfg.train.global_batch_size = build_datasets(cfg)[0].units
        gradients = Gradients()
        result = pretrain(cfg, forward_step, [gradients, *([Blind()] if name == "blind" else [])])
        return {
            "losses": list(result.losses.values()),
            "norms": list(result.grad_norms.values()),
            "gradients": gradients.found,
            "samples": cfg.train.global_batch_size,
        }

    def begin() -> None:
        from megatron.bridge.training.checkpoint import save_checkpoint
        from megatron.bridge.training.setup import distributed, setup

        for name, model in (("rotary", {}), ("learned", LEARNED)):
            cfg = configured(model, False, save=str(folder / name))
            with distributed(cfg):
                save_checkpoint(0, setup(cfg).model, None, None, cfg)

    def work(layouts: dict[str, dict[str, Any]]) -> dict[str, Any]:
        if "separate" in layouts:
            begin()
        return {name: train(name, model, packing=not name.startswith("separate")) for name, model in layouts.items()}

    separate = {"blind": {}, "separate": {}, "separate, learned": LEARNED}
    found: dict[str, dict[str, Any]] = {}
    for ranks, layouts in LAYOUTS.items():
        by_rank = run_ranks(ranks, work, layouts | (separate if ranks == 1 else {}), timeout=300)
        for name in by_rank[-1]:
            found[name] = by_rank[-1][name] | {"gradients": [each[name]["gradients"] for each in by_rank]}
    weights = run_ranks(1, lambda: {name: _weights(folder / name) for name in found}, timeout=100)[0]
    return {name: found[name] | {"weights": weights[name]} for name in found}


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The whole weights in a checkpoint, whatever its layout was."""
    from megatron.core.dist_checkpointing.serialization import load_plain_tensors

    loaded = load_plain_tensors(str(dist_checkpoint.resolve(checkpoint)))
    return {
        name: value
        for name, value in loaded.items()
        if isinstance(value, torch.Tensor) and not name.startswith("optimizer.")
    }


def reference(runs: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    return runs["separate, learned" if "learned" in name else "separate"]


NAMES = [name for layouts in LAYOUTS.values() for name in layouts]


@pytest.mark.parametrize("name", NAMES)
def test_losses_norms_and_weights_are_those_of_separate_documents(runs: dict[str, dict[str, Any]], name: str) -> None:
    ours, theirs = runs[name], reference(runs, name)
    assert ours["samples"] < theirs["samples"] == ROWS  # several documents in a pack
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=TOLERANCE)
    assert ours["norms"] == pytest.approx(theirs["norms"], abs=TOLERANCE, rel=TOLERANCE)
    assert ours["weights"].keys() == theirs["weights"].keys()
    for key, value in theirs["weights"].items():
        # Two steps of Adam with a rate of 3e-3 magnify the last bits of the smallest gradients.
        assert (ours["weights"][key] - value).abs().max() < 1e-4, key


@pytest.mark.parametrize("name", [name for name in NAMES if "TP2" not in name])
def test_gradients_are_those_of_separate_documents(runs: dict[str, dict[str, Any]], name: str) -> None:
    """Of every weight, on whichever rank holds it; tensor-parallel ranks hold parts, whose norms are compared above."""
    ours = {key: value for found in runs[name]["gradients"] for key, value in found.items()}
    (theirs,) = reference(runs, name)["gradients"]
    # Stages that share a weight each hold it.
    assert ours.keys() >= theirs.keys()
    for key, value in theirs.items():
        assert (ours[key] - value).abs().max() < TOLERANCE * max(1.0, value.abs().max().item()), key


def test_documents_that_saw_each_other_would_be_noticed(runs: dict[str, dict[str, Any]]) -> None:
    """The comparison can fail: without the documents' bounds it does."""
    assert runs["blind"]["losses"][0] != pytest.approx(runs["separate"]["losses"][0], abs=100 * TOLERANCE)


@pytest.mark.parametrize(
    ("model", "settings", "why"),
    [
        ({}, {"micro_batch_size": 2}, "takes train.micro_batch_size=1, not 2"),
        ({"layer_spec": "local"}, {}, "needs model.layer_spec 'torch'"),
        ({"mtp_num_layers": 1}, {}, "does not go with prediction layers"),
    ],
)
def test_what_packing_cannot_do_is_refused(
    make_run: Callable[..., Any], folder: Path, model: dict[str, Any], settings: dict[str, Any], why: str
) -> None:
    cfg = make_run(model, **settings)
    cfg.dataset = SFTDatasetConfig(data_paths=[str(folder / "rows.jsonl")], packing=True)
    with pytest.raises(BridgeError, match=why):
        cfg.validate(1)
