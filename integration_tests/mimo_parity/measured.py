"""Runs the cases: references in this process, then one job of forked ranks for each number of ranks."""

from collections.abc import Sequence
from pathlib import Path

from megatron.bridge.testing import run_ranks, save_random_model
from mimo_parity.adapted import METHODS, begun, method_of
from mimo_parity.cases import Case
from mimo_parity.placed import Distance, train_placed
from mimo_parity.reference import Outcome, train_transformers
from mimo_parity.subjects import SUBJECTS

STEPS, MICROBATCHES, SAMPLES = 3, 2, 4
_SIZES = {"steps": STEPS, "microbatches": MICROBATCHES, "samples": SAMPLES}
# Settings that change what is computed, not only where.
_MEANT = ("frozen", "frozen_language", "rates", "vit", *METHODS)


def measured(cases: Sequence[Case], folder: Path) -> dict[str, Distance]:
    """How far each case is from transformers: the largest over its ranks."""
    for name in dict.fromkeys(case.subject for case in cases):
        save_random_model(SUBJECTS[name].config(), folder / name)
    references: dict[object, Outcome] = {}
    starts: dict[object, Path] = {}
    for case in cases:
        start = None
        if method := method_of(case.settings):
            where = folder / f"{case.subject} {method}{' vit' * ('vit' in case.settings)}"
            start = starts[where] = starts.get(where) or begun(case, folder / case.subject, where)
        if _key(case) not in references:
            references[_key(case)] = train_transformers(
                case.subject,
                folder / case.subject,
                uneven=case.uneven,
                packing=case.packing,
                settings=case.settings,
                start=start,
                **_SIZES,
            )
    found: dict[str, Distance] = {}
    for ranks in sorted({case.ranks for case in cases}):
        mine = [case for case in cases if case.ranks == ranks]

        def work(mine: list[Case] = mine) -> list[Distance]:
            return [train_placed(each, folder / each.subject, references[_key(each)], **_SIZES) for each in mine]

        by_rank = run_ranks(ranks, work, timeout=400)
        found |= {case.name: _worst(each) for case, *each in zip(mine, *by_rank, strict=True)}
    return {f"{case.mode}: {case.name}": found[case.name] for case in cases}


def _key(case: Case) -> object:
    return case.subject, case.uneven, case.packing, frozenset(case.settings) & {*_MEANT}


def _worst(found: Sequence[Distance]) -> Distance:
    return Distance(*(max(values) for values in zip(*(vars(each).values() for each in found), strict=True)))
