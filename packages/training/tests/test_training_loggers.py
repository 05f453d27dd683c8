"""Loggers by name, callbacks at every moment of the loop, and which checkpoints stay."""

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge.conversion.checkpoint_layout import saved_iterations
from megatron.bridge.testing import RankFailed, run_ranks
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.loggers import LOGGERS, MetricLogger
from megatron.bridge.training.loggers.jsonl import METRICS_FILE
from megatron.bridge.training.phases import PHASES
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.validation import ConfigError


class Remembering(MetricLogger):
    """Writes down what it is told, and counts the runs it was part of."""

    def __init__(self, cfg: Any, first: int, state: Mapping[str, Any]) -> None:
        super().__init__(cfg, first, state)
        self.runs = int(state.get("runs", 0)) + 1
        self.file = Path(cfg.logger.options["remembering"]["file"])

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._write([self.runs, iteration, *sorted(metrics)])

    def message(self, text: str) -> None:
        self._write(text)

    def state(self) -> dict[str, Any]:
        return {"runs": self.runs}

    def close(self) -> None:
        self._write("closed")

    def _write(self, value: Any) -> None:
        with self.file.open("a") as stream:
            stream.write(json.dumps(value) + "\n")


@pytest.fixture
def remembering() -> Any:
    LOGGERS.register("remembering", Remembering)
    yield
    LOGGERS.unregister("remembering")


def read(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.usefixtures("remembering")
def test_a_logger_of_another_package_goes_on_after_a_resume(make_run: Callable[..., Any], tmp_path: Path) -> None:
    told = tmp_path / "told.jsonl"
    settings: dict[str, Any] = {
        "loggers": ["remembering"],
        "options": {"remembering": {"file": str(told)}},
        "save": str(tmp_path / "run"),
        "eval_interval": 2,
        "eval_iters": 1,
    }
    run_ranks(2, pretrain, make_run(train_iters=2, **settings), forward_step)
    run_ranks(1, pretrain, make_run(train_iters=3, load=str(tmp_path / "run"), **settings), forward_step)
    records = read(told)
    metrics = ["grad_norm", "learning_rate", "loss", "tokens_per_second", "step_seconds", "tflops_per_device"]
    metrics = sorted([*metrics, "memory_gib", *(f"{phase}_seconds" for phase in PHASES)])
    assert [record for record in records if isinstance(record, list)] == [
        [1, 1, *metrics],
        [1, 2, *metrics],
        [1, 2, "valid_loss"],
        [2, 3, *metrics],
    ]
    assert records.count("closed") == 2
    assert any(str(record).startswith("checkpoint ") for record in records)
    assert not (tmp_path / "run" / METRICS_FILE).exists()


def test_wandb_and_mlflow_hold_the_metrics(
    make_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # A folder of files stands for a server: databases are no part of the small MLflow.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = str(tmp_path / "mlruns")
    settings: dict[str, Any] = {
        "wandb_project": "tiny",
        "wandb_save_dir": str(tmp_path),
        "mlflow_experiment": "tiny",
        "mlflow_tracking_uri": uri,
        "save": str(tmp_path / "run"),
    }
    first = run_ranks(1, pretrain, make_run(train_iters=2, **settings), forward_step)[0]
    second = run_ranks(1, pretrain, make_run(train_iters=4, load=str(tmp_path / "run"), **settings), forward_step)[0]
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    history = {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, "loss")}
    assert history == pytest.approx(first.losses | second.losses)
    assert run.info.status == "FINISHED"
    ids = {folder.name.rpartition("-")[2] for folder in (tmp_path / "wandb").glob("offline-run-*")}
    assert len(ids) == 1  # the second run went on under the first one's id


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"loggers": ["jsonnl"]}, r"logger.loggers: .*'jsonnl'.*did you mean 'jsonl'"),
        ({"options": {"mine": {}}}, "settings for 'mine', which is none of the run's loggers"),
        ({"loggers": ["mlflow"]}, "names 'mlflow', which needs logger.mlflow_experiment; set it"),
        ({"loggers": ["jsonl"]}, "names 'jsonl', which needs logger.folder; set it"),
        ({"wandb_project": "p"}, r"needs the package wandb.*megatron-bridge-training\[wandb\]"),
        ({"mlflow_experiment": "e"}, r"needs the package mlflow.*megatron-bridge-training\[mlflow\]"),
    ],
)
def test_loggers_that_cannot_work_are_refused(
    settings: dict[str, Any], problem: str, make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    absent = ("wandb", "mlflow")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    with pytest.raises(ConfigError, match=problem):
        make_run(**settings).validate(1)


class Recording(Callback):
    """Remembers the moments, with the step that each belongs to."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.moments: list[tuple[str, int]] = []
        self.stop_at = stop_at

    def on_train_start(self, run: Any) -> None:
        self.moments.append(("start", run.progress.iteration))

    def on_batch(self, run: Any, batch: dict[str, torch.Tensor]) -> None:
        assert batch["tokens"].shape == (1, run.cfg.model.seq_length)
        self.moments.append(("batch", run.progress.iteration))

    def on_gradients(self, run: Any) -> None:
        reduced = [parameter.main_grad for parameter in run.model[0].parameters()]
        assert any(gradient.abs().max() > 0 for gradient in reduced)
        self.moments.append(("gradients", run.progress.iteration))

    def on_step_end(self, run: Any, result: Any) -> None:
        assert result.loss > 0
        self.moments.append(("step", run.progress.iteration))
        if run.progress.iteration == self.stop_at:
            run.request_stop("the test")

    def on_evaluate_end(self, run: Any, loss: float) -> None:
        assert loss > 0
        self.moments.append(("evaluate", run.progress.iteration))

    def on_save(self, run: Any, folder: Path) -> None:
        assert (folder / ".metadata").is_file()
        self.moments.append(("save", run.progress.iteration))

    def on_train_end(self, run: Any, result: Any) -> None:
        self.moments.append(("end", result.iteration))


def test_callbacks_are_called_at_every_moment(make_run: Callable[..., Any], tmp_path: Path) -> None:
    def work() -> tuple[list[tuple[str, int]], str]:
        callback = Recording(stop_at=2)
        cfg = make_run(train_iters=5, global_batch_size=4, save=str(tmp_path), eval_interval=2, eval_iters=1)
        return pretrain(cfg, forward_step, [callback]).stopped_by, callback.moments  # type: ignore[return-value]

    for stopped_by, moments in run_ranks(2, work):
        assert stopped_by == "callback"
        step = [("batch", 0), ("batch", 0), ("gradients", 0), ("step", 1)]
        second = [("batch", 1), ("batch", 1), ("gradients", 1), ("step", 2), ("evaluate", 2), ("save", 2), ("end", 2)]
        assert moments == [("start", 0), *step, *second]
    assert saved_iterations(tmp_path) == [2]


def test_a_stop_that_one_rank_asks_for_stops_all(make_run: Callable[..., Any]) -> None:
    def work() -> int:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return pretrain(make_run(train_iters=5), forward_step, [Recording(stop_at=2 + rank)]).iteration

    assert run_ranks(2, work) == [2, 2]


def test_an_error_in_a_callback_ends_the_run(make_run: Callable[..., Any]) -> None:
    class Failing(Callback):
        def on_step_end(self, run: Any, result: Any) -> None:
            raise RuntimeError("the callback's own error")

    with pytest.raises(RankFailed, match="the callback's own error"):
        run_ranks(1, pretrain, make_run(train_iters=2), forward_step, [Failing()])


def test_only_the_newest_checkpoints_stay(make_run: Callable[..., Any], tmp_path: Path) -> None:
    def work() -> None:
        pretrain(make_run(train_iters=1, save=str(tmp_path), save_interval=1), forward_step)
        # What a run started from is not its own to remove.
        start = {"pretrained_checkpoint": str(tmp_path / "iter_0000001"), "save": str(tmp_path / "run")}
        pretrain(make_run(train_iters=5, save_interval=1, most_recent_k=2, **start), forward_step)

    run_ranks(2, work)
    assert saved_iterations(tmp_path) == [1]
    assert saved_iterations(tmp_path / "run") == [4, 5]
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "5"
    assert not list((tmp_path / "run").glob(".iter*"))
