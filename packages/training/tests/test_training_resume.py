"""Stopping and going on: nothing is lost, nothing is repeated, and what cannot go on says why."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge.conversion import dist_checkpoint
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import RankFailed, run_ranks
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.checkpoint import load_checkpoint, load_weights, save_checkpoint
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.overrides import apply_yaml
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.setup import distributed, setup
from megatron.bridge.training.side_files import RUN_CONFIG

DISTRIBUTED = {"use_distributed_optimizer": True}
VPP: dict[str, Any] = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one rank with dropout": (1, {"hidden_dropout": 0.1, "attention_dropout": 0.1}, {}),
    "one rank, bf16": (1, {"bf16": True, "params_dtype": torch.bfloat16}, {}),
    "DP2, distributed optimizer": (2, {}, DISTRIBUTED),
    "DP2, distributed optimizer, bf16": (2, {"bf16": True, "params_dtype": torch.bfloat16}, DISTRIBUTED),
    "TP2 with dropout": (2, {"tensor_model_parallel_size": 2, "hidden_dropout": 0.1}, {}),
    "PP2 x VPP2": (2, VPP, {}),
    "DP2 with dropout of each replica's own": (2, {"hidden_dropout": 0.1}, {"data_parallel_random_init": True}),
}


def _everything(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint: weights, moments, master weights."""
    from megatron.core.dist_checkpointing.serialization import load_plain_tensors

    loaded = load_plain_tensors(str(dist_checkpoint.resolve(folder)))
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_ten_steps_are_five_and_five(name: str, make_run: Callable[..., Any], tmp_path: Path) -> None:
    ranks, model, settings = LAYOUTS[name]

    def work() -> tuple[dict[int, float], dict[int, float]]:
        whole = pretrain(make_run(model, train_iters=10, save=str(tmp_path / "whole"), **settings), forward_step)
        pretrain(make_run(model, train_iters=5, save=str(tmp_path / "parts"), **settings), forward_step)
        parts = {"load": str(tmp_path / "parts"), "save": str(tmp_path / "parts")}
        rest = pretrain(make_run(model, train_iters=10, **parts, **settings), forward_step)
        return whole.losses, rest.losses

    whole, rest = run_ranks(ranks, work, timeout=120)[0]
    assert list(rest) == [6, 7, 8, 9, 10]
    assert rest == {step: whole[step] for step in rest}  # bit for bit

    def differing() -> list[str]:
        one, other = _everything(tmp_path / "whole"), _everything(tmp_path / "parts")
        assert one.keys() == other.keys()
        assert any(key.startswith("optimizer.state.exp_avg") for key in one)
        return [key for key in one if not torch.equal(one[key], other[key])]

    assert run_ranks(1, differing, timeout=60) == [[]]


def test_replicas_may_draw_random_numbers_of_their_own(make_run: Callable[..., Any]) -> None:
    def work() -> list[dict[int, float]]:
        dropout, own = {"hidden_dropout": 0.1}, {"data_parallel_random_init": True}
        runs: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {}), ({}, own), (dropout, {}), (dropout, own)]
        return [pretrain(make_run(model, train_iters=2, **settings), forward_step).losses for model, settings in runs]

    plain, from_the_same_weights, alike, each_its_own = run_ranks(2, work, timeout=120)[0]
    assert plain == from_the_same_weights
    assert alike[1] != each_its_own[1]


def test_a_run_goes_on_at_another_layout(make_run: Callable[..., Any], tmp_path: Path) -> None:
    """Saved with DP2 and the distributed optimizer; resumed at TP2 and at PP2."""
    start = {"load": str(tmp_path / "start")} | DISTRIBUTED

    def first() -> None:
        pretrain(make_run(train_iters=3, save=str(tmp_path / "start"), **DISTRIBUTED), forward_step)

    def rest() -> list[list[float]]:
        layouts: list[dict[str, Any]] = [
            {},
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            {"pipeline_model_parallel_size": 2},
        ]
        return [
            list(pretrain(make_run(model, train_iters=8, **start), forward_step).losses.values()) for model in layouts
        ]

    run_ranks(2, first, timeout=60)
    same, tensor, pipeline = run_ranks(2, rest, timeout=100)[0]
    assert tensor == pytest.approx(same, rel=1e-5)
    assert pipeline == pytest.approx(same, rel=1e-5)


def test_a_signal_saves_and_the_resumed_run_is_the_same(make_run: Callable[..., Any], tmp_path: Path) -> None:
    def interrupted_step(run: Any, data: Any, model: Any) -> Any:
        # One rank alone is told to stop, in the middle of step 3; both must stop after it.
        if run.progress.iteration == 2 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward_step(run, data, model)

    def work() -> Any:
        whole = pretrain(make_run(train_iters=6), forward_step)
        handler = signal.getsignal(signal.SIGTERM)
        stopped = pretrain(make_run(train_iters=6, save=str(tmp_path)), interrupted_step)
        assert signal.getsignal(signal.SIGTERM) is handler
        rest = pretrain(make_run(train_iters=6, save=str(tmp_path), load=str(tmp_path)), forward_step)
        return whole.losses, stopped, rest

    for whole, stopped, rest in run_ranks(2, work, timeout=100):
        assert (stopped.iteration, stopped.stopped_by) == (3, "SIGTERM")
        assert stopped.checkpoint == tmp_path / "iter_0000003"
        assert stopped.losses | rest.losses == whole
        assert rest.stopped_by == "train_iters"


def test_a_time_limit_stops_in_the_same_way(make_run: Callable[..., Any], tmp_path: Path) -> None:
    cfg = make_run(train_iters=10_000, save=str(tmp_path), exit_duration_in_mins=0.01)
    result = run_ranks(1, pretrain, cfg, forward_step, timeout=60)[0]
    assert result.stopped_by == "exit_duration"
    assert 0 < result.iteration < 10_000
    assert dist_checkpoint.latest_iteration(tmp_path) == result.iteration


def test_the_seed_signatures_work_in_a_loop_of_ones_own(make_run: Callable[..., Any], tmp_path: Path) -> None:
    def work() -> tuple[int, int, bool]:
        cfg = make_run(save=str(tmp_path), load=None)
        with distributed(cfg):
            run = setup(cfg)
            before = {name: value.clone() for name, value in run.model[0].module.named_parameters()}
            save_checkpoint(4, run.model, run.optimizer, run.scheduler, cfg)
            for value in run.model[0].parameters():
                value.data.zero_()
            cfg.checkpoint.load = str(tmp_path)
            progress = load_checkpoint(run.model, run.optimizer, run.scheduler, cfg)
            same = all(torch.equal(before[name], value) for name, value in run.model[0].module.named_parameters())
        return progress.iteration, progress.consumed_samples, same

    assert run_ranks(1, work, timeout=60) == [(4, 4 * 8, True)]


def test_the_saved_configuration_configures_the_same_run(make_run: Callable[..., Any], tmp_path: Path) -> None:
    cfg = make_run({"params_dtype": torch.bfloat16, "bf16": True}, train_iters=1, save=str(tmp_path), lr=2e-3)
    run_ranks(1, pretrain, cfg, forward_step, timeout=60)
    again = make_run()
    apply_yaml(again, dist_checkpoint.resolve(tmp_path) / RUN_CONFIG)
    assert again == cfg


def test_a_run_never_writes_into_another_runs_folder(make_run: Callable[..., Any], tmp_path: Path) -> None:
    run_ranks(1, pretrain, make_run(train_iters=2, save=str(tmp_path)), forward_step, timeout=60)
    with pytest.raises(BridgeError, match=r"already holds iteration 2; resume from it with checkpoint\.load"):
        make_run(train_iters=2, save=str(tmp_path)).validate(1)
    make_run(train_iters=4, save=str(tmp_path), load=str(tmp_path)).validate(1)


def test_a_checkpoint_of_another_model_is_refused(make_run: Callable[..., Any], initial_weights: Path) -> None:
    def work() -> None:
        cfg = make_run({"ffn_hidden_size": 32})
        with distributed(cfg):
            load_weights(setup(cfg).model, None, initial_weights)

    with pytest.raises(RankFailed, match=r"does not fit this model.*linear_fc1\.weight is \[4, 128, 32\]"):
        run_ranks(1, work, timeout=60)


def test_a_missing_checkpoint_is_refused_before_anything_is_built(make_run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match=r"checkpoint\.load: .*does not exist"):
        make_run(load=str(tmp_path / "nowhere")).validate(1)


def test_a_trained_checkpoint_keeps_the_hugging_face_files(make_run: Callable[..., Any], tmp_path: Path) -> None:
    """From the checkpoint a run starts from to its own, and on through a resume."""

    def work() -> None:
        from megatron.bridge.conversion.dist_checkpoint import save
        from megatron.bridge.training.checkpoint import _model_state

        (tmp_path / "hf").mkdir()
        (tmp_path / "hf" / "config.json").write_text("{}")
        cfg = make_run()
        with distributed(cfg):
            save(tmp_path / "start", 0, _model_state(setup(cfg).model), side_files={"hf": tmp_path / "hf"})
        start = {"pretrained_checkpoint": str(tmp_path / "start"), "save": str(tmp_path / "first")}
        pretrain(make_run(train_iters=1, **start), forward_step)
        rest = {"load": str(tmp_path / "first"), "save": str(tmp_path / "second")}
        pretrain(make_run(train_iters=2, **rest), forward_step)

    run_ranks(1, work, timeout=60)
    for name in ("first", "second"):
        assert (dist_checkpoint.resolve(tmp_path / name) / "hf" / "config.json").read_text() == "{}"


def _cut(folder: Path) -> None:
    file = max(folder.glob("*.distcp"), key=lambda each: each.stat().st_size)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


def test_the_newest_whole_checkpoint_is_taken_and_the_reason_told(
    make_run: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = {"save": str(tmp_path / "run"), "save_interval": 2}

    def first() -> list[float]:
        return list(pretrain(make_run(train_iters=6, **place), forward_step).losses.values())

    def second() -> tuple[dict[int, float], list[str]]:
        run = make_run(train_iters=8, load=place["save"], progress=True, **place)
        return pretrain(run, forward_step).losses, sorted(path.name for path in (tmp_path / "run").iterdir())

    losses = run_ranks(2, first)[0]
    _cut(tmp_path / "run" / "iter_0000006")
    (tmp_path / "run" / "iter_0000004" / ".metadata").write_bytes(b"no metadata")
    again, names = run_ranks(2, second)[0]
    assert [again[step] for step in (3, 4, 5, 6)] == losses[2:]  # from step 2 on, bit for bit
    assert {"iter_0000004", "iter_0000004.damaged", "iter_0000006", "iter_0000006.damaged", "iter_0000008"} <= {*names}
    told = capfd.readouterr().out
    assert "iter_0000006 is damaged" in told
    assert "going on from" in told
    # A folder that was chosen by name is taken or refused.
    cfg = make_run(load=str(tmp_path / "run" / "iter_0000006.damaged"))
    with pytest.raises(RankFailed, match="is cut off"):
        run_ranks(1, pretrain, cfg, forward_step)


def test_without_any_whole_checkpoint_each_is_named(make_run: Callable[..., Any], tmp_path: Path) -> None:
    run_ranks(1, pretrain, make_run(train_iters=2, save=str(tmp_path), save_interval=1), forward_step)
    for folder in tmp_path.glob("iter_*"):
        _cut(folder)
    with pytest.raises(BridgeError, match=r"iter_0000002 is damaged.*iter_0000001 is damaged"):
        make_run(load=str(tmp_path)).validate(1)


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_learning_rates_are_those_of_the_present_configuration(
    distributed_optimizer: bool, make_run: Callable[..., Any], tmp_path: Path
) -> None:
    class Rates(Callback):
        def __init__(self) -> None:
            self.rates: dict[int, float] = {}

        def on_step_end(self, run: Any, result: Any) -> None:
            self.rates[run.progress.iteration] = result.learning_rate

    def work() -> tuple[dict[int, float], dict[int, float]]:
        settings = {"use_distributed_optimizer": distributed_optimizer}
        pretrain(make_run(train_iters=3, save=str(tmp_path), **settings), forward_step)
        rest, whole = Rates(), Rates()
        pretrain(make_run(train_iters=5, load=str(tmp_path), lr=1e-3, **settings), forward_step, [rest])
        pretrain(make_run(train_iters=5, lr=1e-3, **settings), forward_step, [whole])
        return rest.rates, whole.rates

    rest, whole = run_ranks(1, work)[0]
    assert rest == {step: whole[step] for step in (4, 5)}


def test_the_state_of_another_kind_of_optimizer_is_refused(make_run: Callable[..., Any], tmp_path: Path) -> None:
    run_ranks(1, pretrain, make_run(train_iters=1, save=str(tmp_path)), forward_step)
    cfg = make_run(train_iters=2, load=str(tmp_path), **DISTRIBUTED)
    with pytest.raises(RankFailed, match=r"set ddp\.use_distributed_optimizer=False and"):
        run_ranks(1, pretrain, cfg, forward_step)
    cfg.checkpoint.load_optim = False
    assert run_ranks(1, pretrain, cfg, forward_step)[0].iteration == 2
