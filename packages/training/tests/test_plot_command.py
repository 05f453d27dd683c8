"""Curves are drawn as the records have them: each step once, the later record of a step counting."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import run_ranks
from megatron.bridge.training.curves import read_runs
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.loggers.jsonl import METRICS_FILE
from megatron.bridge.training.plot_command import draw, plot
from megatron.bridge.training.pretrain import pretrain


def _write(folder: Path, records: list[dict[str, Any]], end: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    return folder


def test_a_resumed_run_has_no_double_points(make_run: Callable[..., Any], tmp_path: Path) -> None:
    def doubled(run: Any, data: Any, model: Any) -> Any:
        output, loss_function = forward_step(run, data, model)
        return 2 * output, loss_function

    def work() -> dict[int, float]:
        place = {"save": str(tmp_path / "resumed"), "save_interval": 2}
        pretrain(make_run(train_iters=3, eval_interval=2, eval_iters=1, **place), forward_step)
        place["load"] = str(tmp_path / "resumed" / "iter_0000002")
        other = {"save": str(tmp_path / "on"), "folder": str(tmp_path / "resumed"), "load": place["load"]}
        return pretrain(make_run(train_iters=5, eval_interval=2, eval_iters=1, **other), doubled).losses

    losses = run_ranks(1, work, timeout=60)[0]
    lines = (tmp_path / "resumed" / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines if '"loss"' in line] == [1, 2, 3, 3, 4, 5]
    curves = read_runs([tmp_path / "resumed"])[0].curves
    assert [step for step, _ in curves["loss"]] == [1, 2, 3, 4, 5]
    assert dict(curves["loss"])[3] == losses[3] > 1.5 * dict(curves["loss"])[2]
    assert [step for step, _ in curves["valid_loss"]] == [2, 4]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_of_two_runs(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = _write(tmp_path / "one", [{"iteration": step, "loss": 9.0 - step, "grad_norm": 1.0} for step in (1, 2, 3)])
    two = _write(tmp_path / "two" / "checkpoints", [{"iteration": 2, "loss": 5.0, "valid_loss": 4.5}], end='{"itera')
    picture = tmp_path / "pictures" / f"curves.{suffix}"
    done = CliRunner().invoke(plot, [str(one), str(two.parent), "--output", str(picture)], catch_exceptions=False)
    assert done.output.rstrip().endswith("loss, valid_loss, grad_norm of one, two")
    assert picture.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    figure = draw(read_runs([one, two.parent]), ["loss", "valid_loss", "grad_norm"], log=True)
    drawn = [[line.get_xydata().tolist() for line in axis.lines] for axis in figure.axes]
    assert drawn == [[[[1, 8], [2, 7], [3, 6]], [[2, 5]]], [[], [[2, 4.5]]], [[[1, 1], [2, 1], [3, 1]], []]]
    assert [axis.get_yscale() for axis in figure.axes] == ["log", "log", "linear"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["one", "two"]


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    records = [{"iteration": 1, "loss": 2.0}, {"iteration": 2, "loss": 3.0}, {"iteration": 2, "loss": None}]
    assert read_runs([_write(tmp_path / "run", records)])[0].curves == {"loss": [(1, 2.0)]}


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _write(tmp_path / "run", [{"iteration": 1, "loss": 2.0}])
    broken = _write(tmp_path / "broken", [{"loss": 2.0}, {"iteration": 1, "loss": 2.0}])
    refused = {
        (str(tmp_path / "nowhere"),): "holds no metrics.jsonl",
        (str(broken),): r"metrics.jsonl:1 is no record",
        (str(_write(tmp_path / "empty", [])),): "has no records yet",
        (str(run), "--output", str(tmp_path / "curves.bmp")): "must end in one of",
        (str(run), "--metric", "los"): "no run has the metric 'los'; there are loss",
    }
    for arguments, message in refused.items():
        with pytest.raises(BridgeError, match=message):
            CliRunner().invoke(plot, arguments, catch_exceptions=False)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(BridgeError, match=r"uv pip install 'megatron-bridge-training\[plot\]'"):
        CliRunner().invoke(plot, [str(run)], catch_exceptions=False)
    assert not list(tmp_path.glob("*.png"))
