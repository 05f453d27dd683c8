"""What a run reports, evaluates and refuses."""

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge.testing import RankFailed, run_ranks
from megatron.bridge.training.fault_tolerance import NotFinite
from megatron.bridge.training.gpt_step import forward_step, masked_loss
from megatron.bridge.training.loggers.jsonl import METRICS_FILE
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.validation import ConfigError


def test_metrics_and_evaluation(
    make_run: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = make_run(
        train_iters=6,
        eval_interval=3,
        eval_iters=2,
        log_interval=2,
        progress=True,
        folder=str(tmp_path),
        lr=1e-9,
        min_lr=0.0,
    )
    result = run_ranks(2, pretrain, cfg, forward_step, timeout=100)[1]
    records = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "valid_loss" in record]
    assert [record["iteration"] for record in steps] == [2, 4, 6]
    assert [record["loss"] for record in steps] == [result.losses[step] for step in (2, 4, 6)]
    assert all(record["tokens_per_second"] > 0 and record["grad_norm"] > 0 for record in steps)
    assert [record["iteration"] for record in evaluations] == [3, 6]
    # The weights hardly move at this learning rate, so the same samples must give the same loss.
    assert evaluations[0]["valid_loss"] == pytest.approx(evaluations[1]["valid_loss"], rel=1e-5)
    assert result.valid_loss == evaluations[1]["valid_loss"]
    assert result.valid_loss == pytest.approx(math.log(128), rel=0.1)
    printed = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(printed) == 5
    assert "tokens/s" in printed[0]
    assert "ETA" in printed[0]
    assert "step 2/6" in printed[0]


@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 2}], ids=["DP2", "PP2"])
def test_nan_stops_the_run_and_names_iteration_and_rank(
    layout: dict[str, int], make_run: Callable[..., Any], tmp_path: Path
) -> None:
    def poisoned(run: Any, data: Any, model: Any) -> Any:
        output, loss_function = forward_step(run, data, model)
        if run.progress.iteration == 2 and torch.distributed.get_rank() == 1:
            output = output * float("nan")
        return output, loss_function

    cfg = make_run(layout, train_iters=5, save=str(tmp_path), save_interval=1)
    with pytest.raises(RankFailed, match=r"^\[rank 0, 1\] the loss is nan at iteration 3 on rank 1;") as caught:
        run_ranks(2, pretrain, cfg, poisoned, timeout=60)
    assert isinstance(caught.value.__cause__, NotFinite)
    assert sorted(entry.name for entry in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000002"]


def test_the_reported_loss_is_the_mean_over_the_kept_tokens() -> None:
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    losses = torch.arange(6.0).reshape(2, 3)
    total, tokens, report = masked_loss(mask, losses)
    assert (total.item(), tokens.item()) == (0 + 2 + 5, 3)
    assert report["lm loss"].tolist() == [7.0, 3.0]


def test_too_few_samples_is_refused_before_the_first_step(make_run: Callable[..., Any]) -> None:
    class Small(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            text = torch.arange(17) + index
            ones = torch.ones(16)
            return {"tokens": text[:-1], "labels": text[1:], "loss_mask": ones, "position_ids": torch.arange(16)}

    def work() -> None:
        cfg = make_run(train_iters=5)
        cfg.dataset.build_train_valid_test_datasets = lambda context: (Small(), None, None)
        pretrain(cfg, forward_step)

    with pytest.raises(RankFailed, match="the dataset has 20 samples"):
        run_ranks(1, work, timeout=60)


def test_what_the_caller_set_up_stays(make_run: Callable[..., Any]) -> None:
    def work() -> tuple[bool, bool]:
        from megatron.core import parallel_state

        pretrain(make_run(train_iters=1), forward_step)
        taken_down = not parallel_state.is_initialized()
        cfg = make_run(train_iters=1)
        cfg.model.initialize_model_parallel()
        pretrain(cfg, forward_step)
        return taken_down, parallel_state.is_initialized() and torch.distributed.is_initialized()

    assert run_ranks(1, work, timeout=60) == [(True, True)]


def test_configuration_and_command_import_nothing_heavy() -> None:
    code = (
        "import sys, megatron.bridge.training.config, megatron.bridge.training.cli, megatron.bridge.training.overrides;"
        "sys.exit(', '.join(m for m in ('torch', 'megatron.core', 'transformers') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_tensorboard_holds_what_the_metrics_file_holds(make_run: Callable[..., Any], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cfg = make_run({}, train_iters=4, log_interval=1, folder=str(tmp_path), tensorboard_dir=str(tmp_path / "events"))
    result = run_ranks(1, pretrain, cfg, forward_step, timeout=100)[0]
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == pytest.approx(result.losses)
    assert "learning_rate" in events.Tags()["scalars"]


def test_tensorboard_that_is_not_installed_is_refused(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name))
    with pytest.raises(ConfigError, match=r"megatron-bridge-training\[tensorboard\]"):
        make_run({}, tensorboard_dir=str(tmp_path)).validate(1)
