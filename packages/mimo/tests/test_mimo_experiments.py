"""Experiments: files read strictly, exchanges told apart from waiting, runs measured side by side, one report."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from megatron.bridge.cli.root import cli
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.experiments.exchanges import Exchange, ExchangeLog
from megatron.bridge.mimo.experiments.experiment import Experiment, ModelSection, RuntimeSection
from megatron.bridge.mimo.experiments.figures import RunFigures
from megatron.bridge.mimo.experiments.ranklog import RankLog, Span
from megatron.bridge.mimo.experiments.reading import files_of, read_experiments
from megatron.bridge.mimo.experiments.report import markdown, verdict
from megatron.bridge.mimo.experiments.running import Outcome
from megatron.bridge.testing import run_ranks

DIGITS = "megatron.bridge.recipes.mimo.digits:digits_vlm_config"
SHIPPED = Path(__file__).parents[3] / "recipes/ablations/digits"


def write(folder: Path, name: str, schedule: str, images: Any, language: Any, **other: Any) -> Path:
    content = {
        "recipe": DIGITS,
        "model": {"module_parallelisms": {"images": images, "language_module": language}},
        **other,
    }
    content["runtime"] = {"pipeline_schedule": schedule, **other.get("runtime", {})}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


# --- files


def test_the_documented_file_is_an_experiment(tmp_path: Path) -> None:
    file = tmp_path / "colocated_exp.yaml"
    file.write_text(
        "model:\n"
        "  module_parallelisms:\n"
        "    images:\n      tensor_parallel: 1\n      pipeline_parallel: 1\n      data_parallel: 8\n"
        "    language_module:\n      tensor_parallel: 8\n      pipeline_parallel: 1\n      data_parallel: 1\n"
        "runtime:\n"
        '  pipeline_schedule: "colocated"  # or "homogeneous" or "1f1b"\n'
        "  enable_performance_monitoring: true\n"
    )
    (found,) = read_experiments([file], recipe=DIGITS, ranks=8)
    assert (found.name, found.mode, found.ranks, found.watched_steps) == ("colocated_exp", "colocated", 8, 10)


def test_a_grid_is_one_experiment_for_each_combination(tmp_path: Path) -> None:
    key = "model.module_parallelisms.images"
    grid = {key: [{"data_parallel": 2}, {"tensor_parallel": 2}], "runtime.num_microbatches": [1, 4]}
    file = write(tmp_path, "grid", "colocated", {}, {"tensor_parallel": 2}, ablate=grid)
    found = read_experiments([file], steps=7)
    assert [each.name for each in found] == [
        f"grid images={sizes} num_microbatches={number}"
        for sizes in ("data_parallel=2", "tensor_parallel=2")
        for number in (1, 4)
    ]
    assert [each.num_microbatches for each in found] == [1, 4, 1, 4]
    assert found[2].placement.module_parallelisms["images"].tensor_parallel == 2
    assert {each.runtime.steps for each in found} == {7}


def test_modules_apart_follow_one_another(tmp_path: Path) -> None:
    file = write(tmp_path, "apart", "1f1b", {"data_parallel": 2}, {"pipeline_parallel": 2})
    (found,) = read_experiments([file])
    assert found.ranks == 4
    assert found.placement.module_parallelisms["language_module"].rank_offset == 2
    assert found.num_microbatches == 4


def test_every_fault_of_every_file_is_told_at_once(tmp_path: Path) -> None:
    write(tmp_path, "a", "colocated", {"data_paralel": 2}, {"tensor_parallel": 2})
    write(tmp_path, "b", "gpipe", {}, {}, rutime={"steps": 1})
    write(tmp_path, "c", "gpipe", {}, {})
    write(tmp_path, "d", "colocated", {"data_parallel": 3}, {"tensor_parallel": 2}, runtime={"steps": 0})
    write(tmp_path, "e", "1f1b", {}, {}, recipe=None)
    write(tmp_path, "f", "1f1b", {}, {}, ablate={"runtime.steps": 3})
    (tmp_path / "g.yaml").write_text("[1, 2")
    with pytest.raises(BridgeError) as refused:
        read_experiments(files_of(None, tmp_path))
    for told in (
        "a: unknown key 'model.module_parallelisms.images.data_paralel'; did you mean 'data_parallel'",
        "b: the settings cannot be used: unknown key 'rutime'",
        "c: runtime.pipeline_schedule='gpipe' is none of homogeneous, colocated, 1f1b, heterogeneous",
        "d: runtime.steps=0 must be greater than 0",
        "d: the colocated placement of 2 modules on 3 ranks cannot work",
        "e: it names no model",
        "f.yaml: ablate: must name keys and lists of values",
        "g.yaml: the configuration file",
    ):
        assert told in str(refused.value), str(refused.value)


def test_one_file_or_one_folder(tmp_path: Path) -> None:
    for config, folder in ((None, None), (tmp_path, tmp_path)):
        with pytest.raises(BridgeError, match="say what to run"):
            files_of(config, folder)
    with pytest.raises(BridgeError, match=r"holds no \*.yaml"):
        files_of(None, tmp_path)


def test_the_shipped_folder_has_six_files_for_two_ranks() -> None:
    files = files_of(None, SHIPPED)
    found = read_experiments(files, ranks=2)
    assert len(files) == 6
    assert {each.mode for each in found} == {"homogeneous", "colocated", "heterogeneous"}


# --- exchanges


def _late_rank() -> tuple[list[Exchange], float]:
    """Rank 1 is late for a sum, then for a message; waits are those of a plain program."""
    import torch
    import torch.distributed as dist

    log, rank = ExchangeLog(), dist.get_rank()
    dist.barrier()
    with log.open():
        time.sleep(0.2 * rank)
        summed = torch.full((1000,), float(rank))
        dist.all_reduce(summed)
        time.sleep(0.2 * rank)
        message = torch.full((500,), float(rank))
        operation = dist.irecv if rank == 0 else dist.isend
        for work in dist.batch_isend_irecv([dist.P2POp(operation, message, 1 - rank)]):
            work.wait()
    dist.all_reduce(summed)
    return log.exchanges, float(summed[0] + message[0])


def test_waiting_is_told_from_exchanging_and_nothing_waits_twice() -> None:
    (early, late), results = zip(*run_ranks(2, _late_rank, timeout=60), strict=True)
    assert results == (3.0, 3.0)
    assert [each.nbytes for each in early] == [each.nbytes for each in late] == [4000, 2000]
    assert [each.key for each in early] == [each.key for each in late]
    logs = []
    for exchanges in (early, late):
        span = [exchanges[0].begun, exchanges[-1].held[-1][1]]
        logs.append(RankLog("here", ["m"], seconds=[1.0], watched=span, exchanges=exchanges, samples=1))
    waits = [each.waiting for each in RunFigures(logs).ranks]
    assert waits[0] == pytest.approx(0.4, abs=0.1)
    assert waits[1] < 0.05


# --- figures


def _log(modules: list[str], spans: list[Span], exchanges: list[Exchange]) -> RankLog:
    return RankLog(
        "here", modules, seconds=[0.9, 1.0, 8.0], watched=[0.0, 1.0], spans=spans, exchanges=exchanges,
        memory_bytes=5, samples=10, tokens=100, flops=4e9, peak_flops=16e9,
    )  # fmt: skip


def _two_ranks() -> RunFigures:
    """An encoder that sends features at 0.3 and is given gradients at 0.8, to a module that is ready from 0 on."""
    first = _log(
        ["images"],
        [
            Span("forward", "images", 0.0, 0.3),
            Span("backward", "images", 0.8, 0.95),
            Span("optimizer", None, 0.95, 1.0),
        ],
        [Exchange("send", ("g", 1), 7, 0.3, [(0.3, 0.35)]), Exchange("recv", ("g", 2), 5, 0.35, [(0.35, 0.8)])],
    )
    second = _log(
        ["lm"],
        [Span("forward", "lm", 0.35, 0.5), Span("backward", "lm", 0.5, 0.75)],
        [Exchange("recv", ("g", 1), 7, 0.0, [(0.0, 0.35)]), Exchange("send", ("g", 2), 5, 0.75, [(0.75, 0.8)])],
    )
    return RunFigures([first, second])


def test_a_step_is_told_apart() -> None:
    found = _two_ranks()
    images, language = found.ranks
    assert (images.waiting, images.exchange) == pytest.approx((0.4, 0.1))
    assert (language.waiting, language.exchange) == pytest.approx((0.3, 0.1))
    assert found.module_seconds("images") == pytest.approx((0.3, 0.15))
    assert images.optimizer == pytest.approx(0.05)
    assert images.other == pytest.approx(0.0)
    assert language.other == pytest.approx(0.2)
    assert found.bubble == pytest.approx(0.35)
    assert (images.exchange_bytes, images.exchanges) == (12, 2)
    assert found.seconds == 1.0
    assert found.samples_per_second_and_rank == pytest.approx(5.0)
    assert found.mfu == pytest.approx(4e9 / 2 / 16e9)
    bars = found.timelines()[1]
    waiting = [(bar.begin, bar.end) for bar in bars if bar.what == "waiting"]
    assert waiting == [pytest.approx((0.0, 0.3))]


def test_the_timeline_is_that_of_a_step_of_median_length() -> None:
    spans = [Span("forward", "lm", begin, begin + 0.1) for begin in (5.1, 5.4, 7.5)]
    log = _log(["lm"], spans, [])
    log.watched = [5.0, 5.2, 7.2, 8.2]
    ((bar,),) = RunFigures([log]).timelines()
    assert (bar.begin, bar.end) == pytest.approx((0.3, 0.4))


def test_what_is_exchanged_within_a_pass_is_not_its_own() -> None:
    spans = [Span("forward", "lm", 0.0, 0.5)]
    inside = Exchange("allreduce", None, 3, 0.1, [(0.1, 0.3), (0.4, 0.6)])
    (rank,) = RunFigures([_log(["lm"], spans, [inside])]).ranks
    assert rank.forward["lm"] == pytest.approx(0.2)


def _experiment(name: str) -> Experiment:
    modules = ModelSection(module_parallelisms={"images": {}, "language_module": {}})
    return Experiment(name=name, model=modules, runtime=RuntimeSection(pipeline_schedule="1f1b"))


def test_the_verdict_names_who_does_most_for_each_rank_and_failures_are_told() -> None:
    slow, fast = _two_ranks(), _two_ranks()
    fast.__dict__["seconds"] = 0.5
    outcomes = [
        Outcome(_experiment("slow"), slow),
        Outcome(_experiment("fast"), fast),
        Outcome(_experiment("broken"), None, "rank 1 died"),
    ]
    assert "'fast' does most for each rank: 100% more than 'slow'." in verdict(outcomes)
    text = markdown(outcomes)
    assert text.index("| fast |") < text.index("| slow |") < text.index("| broken |")
    assert "`broken` failed:\n\n```text\nrank 1 died\n```" in text
    assert verdict(outcomes[1:]) == ""


# --- runs

TINY = {"global_batch_size": 8, "steps": 2, "warmup_steps": 1}
BROKEN = """
from megatron.bridge.recipes.mimo.digits import DigitsProvider, digits_vlm_config

class Absent(DigitsProvider):
    def build_train_valid_test_datasets(self, context):
        raise ValueError("no images today")

def config():
    cfg = digits_vlm_config()
    cfg.dataset = Absent()
    return cfg
"""


@pytest.mark.timeout(600)
def test_a_folder_is_run_and_reported_and_a_failure_is_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "experiments"
    folder.mkdir()
    (tmp_path / "broken_today.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    write(folder, "a_shared", "homogeneous", {"data_parallel": 2}, {"data_parallel": 2}, runtime=TINY)
    write(folder, "b_apart", "1f1b", {}, {"pipeline_parallel": 2}, runtime={**TINY, "num_microbatches": 2})
    write(folder, "c_broken", "1f1b", {}, {}, runtime=TINY, recipe="broken_today:config")
    done = CliRunner().invoke(cli, ["mimo", "run", "--experiments-dir", str(folder), "--timeout", "120"])
    assert done.exit_code == 1, done.output
    report = {each["name"]: each for each in json.loads((folder / "report.json").read_text())}
    assert [each for each, told in report.items() if told["error"] is not None] == ["c_broken"]
    assert "no images today" in report["c_broken"]["error"]
    _check_shared(report["a_shared"])
    _check_apart(report["b_apart"])
    assert "does most for each rank" in (folder / "report.md").read_text()
    assert {each.name for each in folder.glob("*.svg")} == {"throughput.svg", "timeline.svg"}


def _check_shared(report: Any) -> None:
    """Both ranks give the gradients of all their weights once, in fp32, and little else."""
    weights = _trained_weights()
    for rank in report["by_rank"]:
        assert rank["modules"] == ["images", "language_module"]
        assert set(rank["forward"]) == set(rank["backward"]) == {"images", "language_module"}
        assert 4 * weights <= rank["exchange_bytes"] < 4 * weights * 1.1
        spent = sum(rank["forward"].values()) + sum(rank["backward"].values()) + rank["optimizer"]
        assert 0 < spent + rank["waiting"] + rank["exchange"] <= rank["seconds"]


def _check_apart(report: Any) -> None:
    """What the encoder sends is what the first stage receives, and the second stage knows nothing of it."""
    assert [rank["modules"] for rank in report["by_rank"]] == [["images"], ["language_module"], ["language_module"]]
    for rank in report["by_rank"]:
        assert list(rank["forward"]) == list(rank["backward"]) == rank["modules"]
        kinds = {bar["what"] for bar in rank["timeline"]}
        assert {"forward", "backward", "optimizer", "waiting"} <= kinds
        # Two micro-batches go each way.
        assert sum(bar["what"] == "backward" for bar in rank["timeline"]) == 2
    features = 2 * 8 * 16 * 64 * 4  # both ways: samples, features of an image, hidden size, fp32
    assert features <= report["by_rank"][0]["exchange_bytes"] < features * 1.1


def _trained_weights() -> int:
    """As transformers and the shapes of the language model have them."""
    from megatron.bridge.mimo.mimo_recipe import mimo_config
    from megatron.bridge.training.planner.parameters import model_parameters
    from megatron.bridge.training.planner.shape import shape_of

    provider = mimo_config(DIGITS).model
    (encoder,) = provider.encoders.values()
    tower = encoder.build(provider, initialized=True)
    projector = 48 * 64 + 64 + 64 * 64 + 64
    language = model_parameters(shape_of(provider.language))
    return sum(each.numel() for each in tower.parameters()) + projector + language


@pytest.mark.timeout(300)
def test_under_a_launcher_every_rank_runs_all_of_them(tmp_path: Path) -> None:
    from megatron.bridge.cli.root import run

    write(tmp_path, "apart", "1f1b", {}, {}, runtime=TINY)
    plain = {**TINY, "enable_performance_monitoring": False}
    write(tmp_path, "fan_in", "colocated", {"data_parallel": 2}, {"tensor_parallel": 2}, runtime=plain)
    words = ["mimo", "run", "--experiments-dir", str(tmp_path), "--output", str(tmp_path / "report"), "--no-plots"]
    assert run_ranks(2, run, words, timeout=200) == [0, 0]
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert [(each["name"], each["error"], "by_rank" in each) for each in report] == [
        ("apart", None, True),
        ("fan_in", None, False),
    ]
    for each in report:
        assert each["samples_per_second"] == pytest.approx(8 / each["seconds"])
        assert each["fastest_seconds"] <= each["seconds"]


def test_a_dry_run_draws_and_what_the_model_cannot_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a", "colocated", {"data_parallel": 2}, {"tensor_parallel": 2})
    words = ["mimo", "run", "--experiments-dir", str(tmp_path), "--dry-run"]
    told = CliRunner().invoke(cli, words)
    assert told.exit_code == 0, told.output
    assert "colocated placement\nrank  images  language_module" in told.output
    # Four heads, and a batch of 200.
    write(tmp_path, "b", "colocated", {"data_parallel": 8}, {"tensor_parallel": 8})
    write(tmp_path, "c", "1f1b", {}, {}, runtime={"num_microbatches": 3})
    told = CliRunner().invoke(cli, words)
    assert told.exit_code == 1
    assert "num_attention_heads=4" in told.output
    assert "c: runtime.global_batch_size=200 cannot be divided into num_microbatches=3" in told.output
    assert not list(tmp_path.glob("report*"))


def test_operations_of_an_item_are_those_of_its_layers() -> None:
    from megatron.bridge.mimo.experiments.operations import item_flops
    from megatron.bridge.mimo.mimo_recipe import mimo_config

    provider = mimo_config(DIGITS).model
    (encoder,) = provider.encoders.values()
    tokens, hidden, ffn, layers = 16, 48, 96, 2
    of_layers = layers * tokens * (4 * hidden * hidden + 2 * hidden * ffn + 2 * tokens * hidden)
    of_patches = tokens * hidden * 2 * 2
    found = item_flops(encoder, provider)
    # The tower's pooling head, which SigLIP computes though nobody asks, comes on top.
    assert found is not None
    assert 2 * (of_layers + of_patches) <= found <= 2 * (of_layers + of_patches) * 1.6
