"""MIMO placements of all three modes train as transformers and torch do."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mimo_parity.cases import QUICK, WIDE, Case
from mimo_parity.measured import measured
from mimo_parity.reference import load
from mimo_parity.reference import saved as as_saved
from mimo_parity.run import Trained, failing_step, run_of, train_case, trained
from mimo_parity.subjects import llava_config, mixtral_config

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo import ModuleOptimizerConfig
from megatron.bridge.testing import RankFailed, run_ranks, save_random_model
from megatron.bridge.training.callbacks import Callback

PAGE = Path(__file__).parents[1] / "docs/mimo-parity.md"


@pytest.mark.timeout(600)
def test_every_mode_trains_as_transformers_does(tmp_path: Path) -> None:
    found = measured(QUICK, tmp_path)
    assert len(found) == len(QUICK)
    for case, (placement, distance) in zip(QUICK, found.items(), strict=True):
        most = vars(case.tolerance) | {"changed": 0}
        beyond = {what: value for what, value in vars(distance).items() if value > most[what]}
        assert not beyond, f"{placement}: {beyond}"


def test_the_page_has_every_placement() -> None:
    text = PAGE.read_text("utf-8")
    assert all(f"| {case.mode} | {case.name} |" in text for case in (*QUICK, *WIDE))


APART = Case("1 + PP2", "heterogeneous", (1, 1, 1), (1, 2, 1), True)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dies", [True, False], ids=["gone", "failing"])
def test_a_rank_that_fails_is_named_with_its_module_on_every_other(dies: bool, tmp_path: Path) -> None:
    save_random_model(llava_config(), tmp_path / "hf")

    def work() -> str:
        return failing_step(APART, tmp_path / "hf", rank=2, dies=dies)

    if dies:
        with pytest.raises(RankFailed) as ended:
            run_ranks(3, work, timeout=120, grace=40, collective_timeout=30)
        told = str(ended.value)
        assert "[rank 0, 1] a step failed: rank 2 is gone" in told
    else:
        told = " ".join(run_ranks(3, work, timeout=120))
        assert told.count("a step failed: rank 2: ValueError: broken on purpose") == 3
    assert "'images' stands on rank 0, 'language_module' stands on ranks 1-2" in told


SHARED = ("distributed", "overlap", "rates")
COLOCATED = Case("colocated", "colocated", (1, 1, 4), (2, 1, 1), True, SHARED, context=2)
ELSEWHERE = Case("apart", "heterogeneous", (1, 1, 1), (1, 2, 1), True, SHARED)
ALONE = Case("one rank", "homogeneous", (1, 1, 1), (1, 1, 1), True, SHARED)


@pytest.mark.timeout(600)
def test_a_run_goes_on_bitwise_and_at_any_other_placement(tmp_path: Path) -> None:
    save_random_model(llava_config(), tmp_path / "hf")
    saved = str(tmp_path / "saved")

    def first() -> tuple[Trained, Trained]:
        whole = train_case(COLOCATED, tmp_path / "hf")
        train_case(COLOCATED, tmp_path / "hf", stop=2, save=saved)
        return whole, train_case(COLOCATED, tmp_path / "hf", load=saved)

    whole, resumed = run_ranks(COLOCATED.ranks, first, timeout=300)[0]
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > 2}
    assert resumed.valid_loss == whole.valid_loss
    assert all(resumed.weights[name].equal(each) for name, each in whole.weights.items())
    again = str(tmp_path / "again")

    def elsewhere() -> tuple[Trained, Trained]:
        there = train_case(ELSEWHERE, tmp_path / "hf", load=saved, hf_save_path=str(tmp_path / "exported"))
        return there, train_case(ELSEWHERE, tmp_path / "hf", load=saved, stop=3, save=again)

    there, stopped = run_ranks(3, elsewhere, timeout=300)[0]
    model = load(tmp_path / "exported")
    exported = as_saved(model, {name: each.detach() for name, each in model.named_parameters()})
    assert exported.keys() == there.weights.keys()
    assert all(there.weights[name].equal(each) for name, each in exported.items())
    alone = run_ranks(1, lambda: train_case(ALONE, tmp_path / "hf", load=again), timeout=300)[0]
    for losses, weights in ((there.losses, there.weights), (stopped.losses | alone.losses, alone.weights)):
        assert losses.keys() == resumed.losses.keys()
        assert losses == pytest.approx(resumed.losses, abs=1e-5)
        assert weights.keys() == whole.weights.keys()
        for name, each in whole.weights.items():
            assert (weights[name] - each).abs().max() < 1e-5, name


DIVIDED = Case("divided", "colocated", (2, 1, 1), (1, 1, 2), True, ("vit", *SHARED))
WHOLE = Case("apart, whole", "heterogeneous", (1, 1, 1), (1, 1, 1), True, ("vit", *SHARED))


@pytest.mark.timeout(600)
def test_a_divided_tower_goes_on_bitwise_and_undivided(tmp_path: Path) -> None:
    save_random_model(llava_config(), tmp_path / "hf")
    saved = str(tmp_path / "saved")

    def work() -> list[Trained]:
        whole = train_case(DIVIDED, tmp_path / "hf", save=saved, save_interval=2)
        # A tower of transformers' has weights of other names.
        with pytest.raises(
            BridgeError, match=r"model has what the checkpoint lacks: .*tower\.vision_tower\.embeddings"
        ):
            train_case(replace(DIVIDED, settings=SHARED), tmp_path / "hf", load=saved)
        return [whole, *(train_case(case, tmp_path / "hf", load=saved, ckpt_step=2) for case in (DIVIDED, WHOLE))]

    whole, resumed, undivided = run_ranks(2, work, timeout=400)[0]
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > 2}
    assert undivided.losses == pytest.approx(resumed.losses, abs=1e-5)
    for name, each in whole.weights.items():
        assert resumed.weights[name].equal(each), name
        assert (undivided.weights[name] - each).abs().max() < 1e-5, name


def test_rates_of_modules_go_the_way_of_the_runs(tmp_path: Path) -> None:
    save_random_model(llava_config(), tmp_path / "hf")
    own = ModuleOptimizerConfig(lr=4e-3, min_lr=2e-5, weight_decay=0.3)

    class Rates(Callback):
        def __init__(self) -> None:
            self.seen: list[set[tuple[float, float]]] = []

        def on_step_end(self, run: Any, result: Any) -> None:
            # What the next step will use.
            self.seen.append({(group["lr"], group["weight_decay"]) for group in run.optimizer.param_groups})

    def work() -> list[set[tuple[float, float]]]:
        cfg, rates = run_of(Case("", "homogeneous", (1, 1, 1), (1, 1, 1)), tmp_path / "hf"), Rates()
        cfg.model.optimizers = {"images.projector": own}
        cfg.scheduler.lr_decay_style, cfg.scheduler.lr_warmup_iters = "cosine", 0
        trained(cfg, [rates])
        return rates.seen

    def cosine(highest: float, lowest: float) -> list[float]:
        """torch's, over the run's four steps."""
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=highest)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4, eta_min=lowest)
        found = []
        for _ in range(4):
            optimizer.step()
            schedule.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    seen = run_ranks(1, work, timeout=200)[0]
    for found, run_rate, own_rate in zip(seen, cosine(1e-3, 1e-4), cosine(4e-3, 2e-5), strict=True):
        wanted = [(run_rate, 0.0), (run_rate, 0.01), (own_rate, 0.0), (own_rate, 0.3)]
        assert sorted(found) == [pytest.approx(each) for each in sorted(wanted)]


@pytest.mark.timeout(600)
def test_dropout_is_the_same_again_and_does_not_part_tensor_parallel_ranks(tmp_path: Path) -> None:
    save_random_model(llava_config(attention_dropout=0.2), tmp_path / "hf")
    saved = str(tmp_path / "saved")
    # Each rank encodes the images of other samples, more or fewer of them, before the same part of the language.
    case = Case("", "colocated", (1, 1, 2), (2, 1, 1), True)

    def run(stop: int | None = None, **checkpoint: str) -> Trained:
        cfg = run_of(case, tmp_path / "hf", **checkpoint)
        cfg.model.hidden_dropout = cfg.model.attention_dropout = 0.2
        cfg.train.exit_interval = stop
        return trained(cfg)

    whole, stopped, resumed = run_ranks(2, lambda: (run(), run(2, save=saved), run(load=saved)), timeout=300)[0]
    assert not whole.parted
    assert whole.losses == stopped.losses | resumed.losses
    assert all(resumed.weights[name].equal(each) for name, each in whole.weights.items())
    without = run_ranks(2, lambda: train_case(case, tmp_path / "hf", stop=1), timeout=300)[0]
    assert without.losses[1] != whole.losses[1]


@pytest.mark.timeout(600)
def test_losses_of_routers_are_learnt_from_and_reported_at_any_placement(tmp_path: Path) -> None:
    save_random_model(mixtral_config(balancing=0.5), tmp_path / "hf")
    cases = (
        Case("one rank", "homogeneous", (1, 1, 1), (1, 1, 1), True),
        Case("apart", "heterogeneous", (1, 1, 1), (2, 1, 1), True, ("sequence_parallel",)),
    )

    def run(case: Case) -> Trained:
        cfg = run_of(case, tmp_path / "hf")
        cfg.logger.folder = str(tmp_path / case.name)
        return trained(cfg)

    one, apart = (run_ranks(case.ranks, lambda case=case: run(case), timeout=200)[0] for case in cases)
    assert apart.losses == pytest.approx(one.losses, abs=1e-5)
    for name, each in one.weights.items():
        assert (apart.weights[name] - each).abs().max() < 1e-5, name
    told = [
        [json.loads(line).get("load_balancing_loss") for line in (tmp_path / case.name / "metrics.jsonl").open()]
        for case in cases
    ]
    assert any(told[0])
    assert told[1] == [value if value is None else pytest.approx(value, rel=1e-5) for value in told[0]]
