"""A run that is killed at any moment goes on from its last checkpoint, and its curve is that of a run left alone.

The moments are drawn from a seed: in the middle of a step, and before any change that a rank makes to the files of the
run, so inside saves, while `latest` moves and while old checkpoints go. `--kills N` sets how many each set-up suffers.
"""

import contextlib
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from megatron.bridge.conversion.checkpoint_layout import saved_iterations
from megatron.bridge.testing import RankFailed, run_ranks
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

STEPS = 6
INTERVAL = 2
TOLERANCE = 1e-5
DISTRIBUTED = {"use_distributed_optimizer": True}
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
}
TP, PP, EP = ({f"{kind}_model_parallel_size": 2} for kind in ("tensor", "pipeline", "expert"))
# name -> (ranks, model, settings, models at other layouts of two ranks to go on at)
SETUPS: dict[str, tuple[int, dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = {
    "one rank with dropout": (1, {"hidden_dropout": 0.1}, {}, []),
    "DP2, distributed optimizer": (2, {}, DISTRIBUTED, [TP, PP]),
    "TP2": (2, TP, {}, [PP, {}]),
    "experts, EP2": (2, EXPERTS | EP, DISTRIBUTED, [EXPERTS, EXPERTS | TP | {"sequence_parallel": True}]),
}


class Raised(Exception):
    """What a run dies of where no signal kills it."""


@dataclass(frozen=True)
class Kill:
    """One death: `rank` dies `how`, before its `at`-th change to the run's files or in the middle of step `at`.

    `in_background`: whether the run saves while it trains.
    """

    how: Literal["SIGTERM", "SIGKILL", "exception"]
    where: Literal["step", "files"]
    at: int
    rank: int
    in_background: bool

    def strike(self) -> None:
        if self.how == "exception":
            raise Raised(str(self))
        os.kill(os.getpid(), signal.Signals[self.how])


class FileChanges:
    """Counts what this process does to files under `folder`, and strikes before the one that is chosen."""

    _EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"})

    def __init__(self, folder: Path, kill: Kill | None) -> None:
        self.count, self._folder, self._kill = 0, str(folder), kill
        sys.addaudithook(self._see)  # stays until the process ends; a rank is a process of its own

    def _see(self, event: str, details: tuple[Any, ...]) -> None:
        if event not in self._EVENTS or not str(details[0]).startswith(self._folder):
            return
        if event == "open" and not (isinstance(details[1], str) and {*"wax+"} & {*details[1]}):
            return
        self.count += 1
        if self._kill is not None and self.count == self._kill.at:
            self._kill.strike()


class Diary(Callback):
    """Writes down what a rank has done, where it survives the rank."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def on_step_end(self, run: Any, result: Any) -> None:
        self._note(f"step {run.progress.iteration}")

    def on_save(self, run: Any, folder: Path) -> None:
        self._note(f"saved {int(folder.name[-7:])}")

    def _note(self, line: str) -> None:
        with self._file.open("a") as stream:
            stream.write(f"{line}\n")

    @staticmethod
    def last(folder: Path, what: str) -> int:
        """The last iteration that every rank has noted."""
        lines = [[line.split() for line in file.read_text().splitlines()] for file in folder.glob("diary-*")]
        return min((max((int(n) for word, n in each if word == what), default=0) for each in lines), default=0)


def _killed_run(make_run: Callable[..., Any], name: str, folder: Path, kill: Kill | None) -> Any:
    """Train with a diary, and die; (losses, changes to files on this rank) for a run left alone."""
    rank = torch.distributed.get_rank()
    mine = kill if kill is not None and kill.rank == rank else None
    files = FileChanges(folder / "run", mine if mine and mine.where == "files" else None)

    def step(run: Any, data: Any, model: Any) -> Any:
        if mine and mine.where == "step" and run.progress.iteration + 1 == mine.at:
            mine.strike()
        return forward_step(run, data, model)

    _, model, settings, _ = SETUPS[name]
    place = {"save": str(folder / "run"), "save_interval": INTERVAL, "save_retries": 0, "most_recent_k": 2}
    cfg = make_run(model, train_iters=STEPS, async_save=bool(kill and kill.in_background), **place, **settings)
    result = pretrain(cfg, step, [Diary(folder / f"diary-{rank}")])
    return result.losses, files.count


def _kills(number: int, ranks: int, changes: list[int], seed: int) -> Iterator[Kill]:
    """Three of four within saves; each way to die in turn."""
    draw = random.Random(seed)
    for index in range(number):
        how: Any = ("SIGKILL", "exception", "SIGTERM")[index % 3]
        rank, in_background = draw.choice([rank for rank in range(ranks) if changes[rank]]), index % 2 == 0
        if index % 4 == 3:
            yield Kill(how, "step", draw.randint(1, STEPS), draw.randrange(ranks), in_background)
        else:
            yield Kill(how, "files", draw.randint(1, changes[rank]), rank, in_background)


# What every run of the tests sees; `--kills N` is for all set-ups.
_USUAL = {"DP2, distributed optimizer": 3, "experts, EP2": 1}


@pytest.mark.parametrize("name", SETUPS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    name: str, make_run: Callable[..., Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kills = request.config.getoption("--kills", default=None) or _USUAL.get(name)
    if kills is None:
        pytest.skip("with --kills N only")
    ranks, *_, others = SETUPS[name]
    alone = run_ranks(ranks, _killed_run, make_run, name, _made(tmp_path / "alone"), None)
    losses, changes = alone[0][0], [count for _, count in alone]
    deaths = list(_kills(kills, ranks, changes, seed=len(name)))
    folders = {death: _made(tmp_path / f"{index}") for index, death in enumerate(deaths)}
    for death, folder in folders.items():
        with contextlib.suppress(RankFailed):
            run_ranks(ranks, _killed_run, make_run, name, folder, death, grace=1.0)

    def rest() -> list[dict[int, float]]:
        return [_resumed(make_run, name, folder / "run") for folder in folders.values()]

    # Where nothing was saved, the run starts anew, from weights that another layout draws otherwise.
    begun = [folder for folder in folders.values() if saved_iterations(folder / "run")]

    def elsewhere() -> list[dict[int, float]]:
        return [
            _resumed(make_run, name, folder / "run", save=None, model=model)
            for folder in begun[: 1 + kills // 4]
            for model in others
        ]

    moved = run_ranks(2, elsewhere)[0] if others else []
    for curve in moved:
        assert curve == pytest.approx({step: losses[step] for step in curve}, rel=TOLERANCE)
    for (death, folder), curve in zip(folders.items(), run_ranks(ranks, rest)[0], strict=True):
        assert curve == {step: losses[step] for step in curve}, death  # bit for bit
        first, saved, seen = min(curve, default=STEPS + 1), Diary.last(folder, "saved"), Diary.last(folder, "step")
        print(f"{death}: died after step {seen}, had saved step {saved}, went on with step {first}")
        assert saved < first <= seen + 1, death
        assert max(saved_iterations(folder / "run")) == STEPS, death
        assert not list((folder / "run").glob(".*")), death  # nothing half written is left


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _resumed(make_run: Callable[..., Any], name: str, folder: Path, **changes: Any) -> dict[int, float]:
    """Go on from what is there, or from the start where nothing is; the losses of the steps that were done."""
    model = changes.pop("model", SETUPS[name][1])
    settings = {"save": str(folder), "save_interval": INTERVAL, "most_recent_k": 2} | SETUPS[name][2] | changes
    if settings["save"] is None:
        settings |= {"save_interval": None, "most_recent_k": None}
    settings["load"] = str(folder) if saved_iterations(folder) else None
    losses: dict[int, float] = pretrain(make_run(model, train_iters=STEPS, **settings), forward_step).losses
    return losses
