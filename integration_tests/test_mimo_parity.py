"""MIMO placements of all three modes train as transformers and torch do."""

from pathlib import Path

import pytest
from mimo_parity.cases import QUICK, WIDE, Case
from mimo_parity.measured import measured
from mimo_parity.reference import llava_config
from mimo_parity.run import Trained, failing_step, train_case

from megatron.bridge.testing import RankFailed, run_ranks, save_random_model

PAGE = Path(__file__).parents[1] / "docs/mimo-parity.md"
TOLERANCE = {"changed": 0, "logits": 1e-4, "loss": 1e-5, "norm": 1e-5, "gradient": 1e-4, "weight": 1e-4}


@pytest.mark.timeout(600)
def test_every_mode_trains_as_transformers_does(tmp_path: Path) -> None:
    found = measured(QUICK, tmp_path)
    assert len(found) == len(QUICK)
    for placement, distance in found.items():
        beyond = {what: getattr(distance, what) for what, most in TOLERANCE.items() if getattr(distance, what) > most}
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


SHARED = ("distributed", "overlap")
COLOCATED = Case("colocated", "colocated", (1, 1, 2), (2, 1, 1), True, SHARED)
ELSEWHERE = (
    Case("apart", "heterogeneous", (1, 1, 1), (1, 2, 1), True, SHARED),
    Case("one rank", "homogeneous", (1, 1, 1), (1, 1, 1), True, SHARED),
)


@pytest.mark.timeout(600)
def test_a_run_goes_on_bitwise_and_at_any_other_placement(tmp_path: Path) -> None:
    save_random_model(llava_config(), tmp_path / "hf")
    saved = str(tmp_path / "saved")

    def first() -> tuple[Trained, Trained]:
        whole = train_case(COLOCATED, tmp_path / "hf")
        train_case(COLOCATED, tmp_path / "hf", stop=2, save=saved)
        return whole, train_case(COLOCATED, tmp_path / "hf", load=saved)

    whole, resumed = run_ranks(2, first, timeout=300)[0]
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > 2}
    assert resumed.valid_loss == whole.valid_loss
    assert all(resumed.weights[name].equal(each) for name, each in whole.weights.items())
    for case in ELSEWHERE:
        there = run_ranks(case.ranks, lambda case=case: train_case(case, tmp_path / "hf", load=saved), timeout=300)[0]
        assert there.losses.keys() == resumed.losses.keys()
        assert there.losses == pytest.approx(resumed.losses, abs=1e-5)
        assert there.weights.keys() == whole.weights.keys()
        for name, each in whole.weights.items():
            assert (there.weights[name] - each).abs().max() < 1e-5, name
