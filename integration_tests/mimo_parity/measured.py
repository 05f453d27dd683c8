"""Runs the cases: references in this process, then one job of forked ranks for each number of ranks."""

from collections.abc import Sequence
from pathlib import Path

from megatron.bridge.testing import run_ranks, save_random_model
from mimo_parity.cases import Case
from mimo_parity.placed import Distance, train_placed
from mimo_parity.reference import Outcome, llava_config, train_transformers

STEPS, MICROBATCHES, SAMPLES = 3, 2, 4
_SIZES = {"steps": STEPS, "microbatches": MICROBATCHES, "samples": SAMPLES}
_TOWER = "model.vision_tower"


def measured(cases: Sequence[Case], folder: Path) -> dict[str, Distance]:
    """How far each case is from transformers: the largest over its ranks."""
    for name, tied in (("plain", False), ("tied", True)):
        save_random_model(llava_config(tied=tied), folder / name)
    references: dict[object, Outcome] = {}
    for case in cases:
        if _key(case) not in references:
            frozen = (_TOWER,) if "frozen" in case.settings else ()
            references[_key(case)] = train_transformers(
                _model(case, folder), uneven=case.uneven, frozen=frozen, **_SIZES
            )
    found: dict[str, Distance] = {}
    for ranks in sorted({case.ranks for case in cases}):
        mine = [case for case in cases if case.ranks == ranks]

        def work(mine: list[Case] = mine) -> list[Distance]:
            return [train_placed(each, _model(each, folder), references[_key(each)], **_SIZES) for each in mine]

        by_rank = run_ranks(ranks, work, timeout=240)
        found |= {case.name: _worst(each) for case, *each in zip(mine, *by_rank, strict=True)}
    return {f"{case.mode}: {case.name}": found[case.name] for case in cases}


def _key(case: Case) -> object:
    return case.uneven, "tied" in case.settings, "frozen" in case.settings


def _model(case: Case, folder: Path) -> Path:
    return folder / ("tied" if "tied" in case.settings else "plain")


def _worst(found: Sequence[Distance]) -> Distance:
    return Distance(*(max(values) for values in zip(*(vars(each).values() for each in found), strict=True)))
