"""Steps of growing size, runs whose length is given in samples, and the ends that a run may have."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from megatron.bridge.testing import run_ranks
from megatron.bridge.training.batch_sizes import batch_sizes
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.loggers.jsonl import METRICS_FILE
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.validation import ConfigError

RAMP = [2, 2, 21]  # sizes 2, 4, 6 for 7 samples each, then 8


class Drawn(Callback):
    """Keeps the first token of every sequence, by step, over all ranks."""

    def __init__(self) -> None:
        self.steps: dict[int, list[int]] = {}
        self.rates: list[float] = []

    def on_batch(self, run: Any, batch: Any) -> None:
        rows = self.steps.setdefault(run.progress.iteration + 1, [])
        rows += [hash(tuple(row.tolist())) for row in batch["tokens"]]

    def on_step_end(self, run: Any, result: Any) -> None:
        self.rates.append(result.learning_rate)


@given(
    st.integers(1, 6), st.integers(1, 4), st.integers(0, 5), st.integers(1, 60), st.integers(0, 40), st.integers(0, 400)
)
def test_sizes_are_megatrons(start: int, increment: int, parts: int, samples: int, steps: int, asked: int) -> None:
    final = start + parts * increment
    sizes = batch_sizes(final, [start, increment, samples])
    drawn, done, after = 0, 0, [0]
    while done < steps or drawn <= asked:
        # Megatron-LM's rule: so many increments as whole parts of the ramp were drawn.
        whole = int(Fraction(drawn * parts, samples))
        expected = final if drawn > samples else start + whole * increment
        assert sizes.at(drawn) == expected
        drawn, done = drawn + expected, done + 1
        after.append(drawn)
    assert sizes.samples_after(steps) == after[steps]
    assert sizes.iterations_within(asked) == max(number for number, total in enumerate(after) if total <= asked)


def test_sizes_are_those_of_megatron_core() -> None:
    sizes = batch_sizes(8, RAMP)
    schedule = " ".join(f"{first}:{size}" for first, size in sizes.stages)
    theirs = StepBatchsizeNumMicroBatchesCalculator(1, 2, False, 0, schedule)
    for consumed in range(0, 60):
        theirs.update(consumed, consistency_check=False)
        assert (sizes.at(consumed), sizes.at(consumed) // 2) == (theirs.get_current_global_batch_size(), theirs.get())


def test_a_ramp_resumed_is_the_ramp(make_run: Callable[..., Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rampup_batch_size": RAMP, "train_iters": None, "train_samples": 60}
    settings |= {"lr_decay_iters": None, "lr_decay_samples": 60, "lr_warmup_iters": 0, "lr_warmup_samples": 6}

    def work(ranks: int) -> tuple[Any, Any, Any, Drawn]:
        drawn = Drawn()
        whole = pretrain(make_run(folder=str(tmp_path / str(ranks)), **settings), forward_step, [drawn])
        place = {"save": str(tmp_path / f"parts{ranks}"), "exit_interval": 3}
        first = pretrain(make_run(**settings, **place), forward_step)
        rest = pretrain(make_run(**settings, save=place["save"], load=place["save"]), forward_step, [drawn])
        return whole, first, rest, drawn

    one = run_ranks(1, work, 1, timeout=60)[0]
    two = run_ranks(2, work, 2, timeout=60)
    sizes = [2, 2, 2, 2, 4, 4, 6, 8, 8, 8, 8]  # 8, 16, 22 samples at 7 or more, 14 or more, 21 or more; 54 in all
    for whole, first, rest, _ in (one, *two):
        assert (first.iteration, first.stopped_by) == (3, "exit_interval")
        assert (whole.iteration, whole.stopped_by) == (len(sizes), "train_iters")
        assert first.losses | rest.losses == whole.losses  # bit for bit
    records = [json.loads(line) for line in (tmp_path / "1" / METRICS_FILE).read_text().splitlines()]
    assert [record["batch_size"] for record in records] == sizes
    assert [record["learning_rate"] for record in records[:5]] == pytest.approx([0.0, 1e-3, 2e-3, 3e-3, 3e-3], rel=2e-2)
    # Both runs of one rank drew the same sequences; two ranks draw them together.
    alone = {step: rows[: len(rows) // (2 if step > 3 else 1)] for step, rows in one[3].steps.items()}
    assert [len(alone[step]) for step in sorted(alone)] == sizes
    assert list(two[0][0].losses.values()) == pytest.approx(list(one[0].losses.values()), rel=1e-5)


def test_evaluation_alone(make_run: Callable[..., Any], tmp_path: Path) -> None:
    def work() -> Any:
        trained = pretrain(make_run(train_iters=2, eval_interval=2, eval_iters=2, save=str(tmp_path)), forward_step)
        cfg = make_run(train_iters=2, eval_interval=2, eval_iters=2, load=str(tmp_path), skip_train=True)
        return trained, pretrain(cfg, forward_step)

    trained, alone = run_ranks(1, work, timeout=60)[0]
    assert (alone.stopped_by, alone.iteration, alone.losses) == ("skip_train", 2, {})
    assert alone.valid_loss == trained.valid_loss


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_samples": 80}, "train_iters and train.train_samples are both set"),
        ({"train_iters": None}, "neither train.train_iters nor train.train_samples is set"),
        ({"train_iters": None, "train_samples": 7}, "train_samples=7 is less than the first step takes, 8"),
        ({"train_iters": None, "train_samples": 70, "global_batch_size": 0}, "global_batch_size=0 must be greater"),
        ({"rampup_batch_size": [2, 0, 20]}, r"rampup_batch_size=\[2, 0, 20\] must be three numbers greater than 0"),
        ({"rampup_batch_size": [2, 4, 20]}, "does not lead to train.global_batch_size=8"),
        ({"rampup_batch_size": [2, 3, 20]}, r"comes to 5 sequences, not a multiple of train.micro_batch_size=2"),
        ({"skip_train": True}, "train.eval_interval is not set: there is nothing to do"),
        ({"lr_decay_samples": 100}, "lr_decay_iters and scheduler.lr_decay_samples are both set"),
        ({"lr_warmup_samples": 8}, "lr_warmup_iters and scheduler.lr_warmup_samples are both set"),
        ({"lr_warmup_iters": 0, "lr_warmup_samples": 320}, "lr_warmup_samples=320 must be less than the 320 samples"),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_samples": 305},
            "lr_wsd_decay_samples=305 must lie between 1 and the 304 samples",
        ),
    ],
)
def test_lengths_that_cannot_be_are_refused(
    settings: dict[str, Any], message: str, make_run: Callable[..., Any]
) -> None:
    micro = {"micro_batch_size": 2} if settings.get("rampup_batch_size") == [2, 3, 20] else {}
    with pytest.raises(ConfigError, match=message):
        make_run({}, **micro, **settings).validate(1)
