"""A step that goes wrong is left out or done again, on every rank alike; faults of the machine are told from others."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge.testing import RankFailed, run_ranks
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import FaultToleranceConfig
from megatron.bridge.training.fault_tolerance import Guard, LossSpike, NotFinite
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.validation import ConfigError

STEPS = 5
FAULTY = 3
TP: dict[str, Any] = {"tensor_model_parallel_size": 2}
PP: dict[str, Any] = {"pipeline_model_parallel_size": 2}
OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
# Dropout and routers whose biases move: what a step changes besides the weights.
STATEFUL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.05,
}


class Faulty:
    """A forward step that goes wrong on one rank: in its loss or its gradient, in step `FAULTY`.

    Args:
        kind: `loss` or `gradient` becomes NaN, or the loss `leaps`.
        attempts: how many of the attempts at the step go wrong.
        steps: the steps that do.
    """

    def __init__(self, kind: str, attempts: int = 2, steps: tuple[int, ...] = (FAULTY,)) -> None:
        self.kind, self.attempts, self.steps = kind, attempts, steps
        self.done: dict[int, int] = {}

    def __call__(self, run: Any, data: Any, model: Any) -> Any:
        output, loss_function = forward_step(run, data, model)
        step = run.progress.iteration + 1
        # The first micro-batch of each attempt; there are as many attempts as it comes round.
        self.done[step] = self.done.get(step, 0) + 1
        attempt = (self.done[step] - 1) // run.num_microbatches(run.batch_size)
        if step in self.steps and torch.distributed.get_rank() == 1 and attempt < self.attempts and model.training:
            if self.kind == "gradient":
                output.register_hook(lambda gradient: gradient * float("nan"))
            else:
                output = output * (float("nan") if self.kind == "loss" else 50.0)
        return output, loss_function


class WithoutUpdate(Callback):
    """Leaves the optimizer's step `FAULTY` out: what skipping must come to."""

    def on_gradients(self, run: Any) -> None:
        if run.progress.iteration + 1 == FAULTY:
            # A scale other than 1 stands for fp16, where the optimizer leaves updates out by itself.
            run.optimizer.step = lambda: (False, None, None)
            run.optimizer.get_loss_scale = lambda: torch.tensor(2.0)

    def on_step_end(self, run: Any, result: Any) -> None:
        for name in ("step", "get_loss_scale"):
            vars(run.optimizer).pop(name, None)


class Told(Callback):
    """Keeps what steps tell."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.skipped: list[int] = []

    def on_step_end(self, run: Any, result: Any) -> None:
        self.lines += [] if result.told is None else [result.told]
        self.skipped += [run.progress.iteration] if result.skipped else []


def _run(
    make_run: Callable[..., Any], step: Any, model: dict[str, Any], policy: dict[str, Any], **settings: Any
) -> tuple[list[float], Told]:
    cfg = make_run(model, train_iters=STEPS, **settings)
    cfg.fault_tolerance = FaultToleranceConfig(**policy)
    told = Told()
    return list(pretrain(cfg, step, [told]).losses.values()), told


@pytest.mark.parametrize("layout", ["DP2", "TP2", "PP2", "DP2 overlapped"])
def test_a_step_is_skipped_on_every_rank(layout: str, make_run: Callable[..., Any]) -> None:
    model = {"TP2": TP, "PP2": PP}.get(layout, {})
    settings = OVERLAPPED if layout == "DP2 overlapped" else {}

    def work() -> tuple[list[float], dict[str, tuple[list[float], Told]]]:
        cfg = make_run(model, train_iters=STEPS, **settings)
        expected = list(pretrain(cfg, forward_step, [WithoutUpdate()]).losses.values())
        # The loss of the second pipeline stage alone is a loss.
        kinds = ("loss", "gradient")
        return expected, {kind: _run(make_run, Faulty(kind), model, {"on_fault": "skip"}, **settings) for kind in kinds}

    for expected, found in run_ranks(2, work, timeout=120):
        for kind, (losses, told) in found.items():
            assert told.skipped == [FAULTY]
            assert losses[:2] + losses[3:] == expected[:2] + expected[3:]
            # Tensor-parallel ranks have the loss each by itself, and that of rank 0 is not at fault here.
            assert layout == "TP2" or math.isnan(losses[2]) == (kind == "loss")
            assert f"the {kind} is not finite at iteration 3 on rank " in told.lines[0]
            assert told.lines[0].endswith("; its update is skipped")
            if layout == "DP2":
                assert "at iteration 3 on rank 1;" in told.lines[0]


def test_a_step_done_again_is_the_same_step(make_run: Callable[..., Any], tmp_path: Path) -> None:
    policy = {"on_fault": "rerun", "after_rerun": "continue"}

    def work() -> tuple[Any, ...]:
        clean = _run(make_run, forward_step, STATEFUL, {})[0]
        runs = [_run(make_run, Faulty(kind, 1), STATEFUL, policy) for kind in ("loss", "gradient")]
        whole = _run(make_run, forward_step, {}, {}, **OVERLAPPED)[0]
        return clean, runs, whole, _run(make_run, Faulty("loss", 1), {}, policy, **OVERLAPPED)

    for clean, runs, whole, overlapped in run_ranks(2, work, timeout=120):
        for losses, told in runs:
            assert losses == clean  # bit for bit: data, dropout and router biases were those of the first attempt
            assert not told.skipped
            assert "on rank 1; done again from the same state it is sound" in told.lines[0]
            assert "suspect the hardware, first that of rank 1, not model or data; going on" in told.lines[0]
        assert overlapped[0] == whole
        assert len(overlapped[1].lines) == 1


def test_a_fault_that_comes_back_is_one_of_model_or_data(make_run: Callable[..., Any]) -> None:
    def work(after: str) -> Any:
        return _run(make_run, Faulty("loss"), {}, {"on_fault": "rerun", "after_rerun": after})

    with pytest.raises(
        RankFailed, match=r"\[rank 0, 1\] .*it comes out the same: model or data are at fault.*iteration 2"
    ):
        run_ranks(2, work, "stop", timeout=60)
    told = run_ranks(2, work, "continue", timeout=60)[0][1]
    assert told.skipped == [FAULTY]
    assert "model or data are at fault, not the hardware; its update is skipped" in told.lines[0]


def test_only_so_many_steps_in_a_row_are_skipped(make_run: Callable[..., Any], tmp_path: Path) -> None:
    policy = {"on_fault": "skip", "max_skips_in_a_row": 1}

    def apart() -> list[int]:
        return _run(make_run, Faulty("loss", steps=(2, 4)), {}, policy)[1].skipped

    def in_a_row(steps: int, load: str | None) -> Any:
        cfg = make_run({}, train_iters=steps, save=str(tmp_path), load=load)
        cfg.fault_tolerance = FaultToleranceConfig(**policy)
        return pretrain(cfg, Faulty("loss", steps=(2, 3)), ()).iteration

    assert run_ranks(2, apart, timeout=60) == [[2, 4]] * 2
    assert run_ranks(2, in_a_row, 2, None, timeout=60) == [2, 2]
    # The count goes on after a resume.
    with pytest.raises(
        RankFailed, match=r"at iteration 3 on rank 1; 1 steps in a row were skipped before it"
    ) as caught:
        run_ranks(2, in_a_row, 3, str(tmp_path), timeout=60)
    assert isinstance(caught.value.__cause__, NotFinite)


def test_a_leap_of_the_loss_is_a_fault(make_run: Callable[..., Any]) -> None:
    window = {"loss_spike_threshold": 10.0, "loss_spike_window": 2}

    def work() -> Told:
        return _run(make_run, Faulty("leap"), {}, window | {"on_fault": "skip"})[1]

    told = run_ranks(2, work, timeout=60)[0]
    assert told.skipped == [FAULTY]
    assert "the loss leapt to " in told.lines[0]
    with pytest.raises(RankFailed, match="the loss leapt to ") as caught:
        run_ranks(2, lambda: _run(make_run, Faulty("leap"), {}, window), timeout=60)
    assert isinstance(caught.value.__cause__, LossSpike)


def test_what_leaps() -> None:
    guard = Guard(FaultToleranceConfig(loss_spike_threshold=5.0, loss_spike_window=5), scaled=False)
    assert not guard.leaps(1e9)  # nothing to compare with
    guard.load_state_dict({"losses": [2.0, 2.1, 1.9, 2.05, 40.0], "left_out": 0})
    # Median 2.05, median deviation 0.05 x 1.4826; one outlier among them changes nothing.
    assert not guard.leaps(2.05 + 5 * 0.05 * 1.4826 - 1e-6)
    assert guard.leaps(2.05 + 5 * 0.05 * 1.4826 + 1e-6)
    flat = Guard(FaultToleranceConfig(loss_spike_threshold=5.0, loss_spike_window=2), scaled=False)
    flat.load_state_dict({"losses": [2.0, 2.0], "left_out": 0})
    assert not flat.leaps(2.09)
    assert flat.leaps(2.11)
    assert flat.state_dict() == {"losses": [2.0, 2.0], "left_out": 0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_skips_in_a_row": -1}, r"max_skips_in_a_row=-1 must not be negative"),
        ({"loss_spike_threshold": 0.0}, r"loss_spike_threshold=0.0 must be greater than 0"),
        ({"rerun_tolerance": 0.1}, "belong to on_fault='rerun'"),
        ({"on_fault": "skip", "check_for_nan_in_grad": True}, r"leave ddp\.check_for_nan_in_grad out"),
    ],
)
def test_policies_that_contradict_are_refused(
    settings: dict[str, Any], message: str, make_run: Callable[..., Any]
) -> None:
    cfg = make_run()
    cfg.ddp.check_for_nan_in_grad = settings.pop("check_for_nan_in_grad", False)
    cfg.fault_tolerance = FaultToleranceConfig(**settings)
    with pytest.raises(ConfigError, match=message):
        cfg.validate(1)
