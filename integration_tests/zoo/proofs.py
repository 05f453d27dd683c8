"""What the zoo proves of several architectures at once: each layout in ranks that take one case after another."""

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron.bridge import AutoBridge
from megatron.bridge.errors import BridgeError
from megatron.bridge.models.capabilities import Capability
from megatron.bridge.testing import run_ranks
from megatron.bridge.testing.families import FamilyCase, FamilyMismatch, compare_in_rank
from megatron.bridge.testing.layouts import (
    EP,
    ETP,
    EVERYWHERE,
    EXPERTS_EVERYWHERE,
    layout_fields,
    layouts_for,
    ranks_of,
)
from zoo.biases import train_biases
from zoo.exhibits import Exhibit
from zoo.low_bit import in_fp8, read_low_bit
from zoo.predictions import proven_predictions

LAYER_SPEC = "torch"
TOLERANCE = 1e-4
SECONDS = 60  # for one case at one layout
LONGEST_REASON = 160  # characters

type Attempt = Callable[[FamilyCase, Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Specimen:
    """An architecture's cases, made; `mixtures`: names of those with experts."""

    cases: tuple[FamilyCase, ...]
    mixtures: frozenset[str]

    def at(self, layout: str) -> tuple[FamilyCase, ...]:
        """The cases for which the layout means something."""
        if not {EP, ETP} & layout_fields(layout).keys():
            return self.cases
        return tuple(case for case in self.cases if case.name in self.mixtures)

    @classmethod
    def of(cls, exhibits: Sequence[Exhibit], root: Path) -> "Specimen":
        """Make the cases below `root`."""
        cases = tuple(exhibit.case(root) for exhibit in exhibits)
        providers = [AutoBridge.from_hf_pretrained(case.folder).to_megatron_provider() for case in cases]
        having = zip(cases, providers, strict=True)
        return cls(
            cases,
            mixtures=frozenset(case.name for case, provider in having if getattr(provider, "num_moe_experts", None)),
        )


@dataclass(frozen=True)
class Failed:
    """An attempt that raised, and why, in one line."""

    reason: str


def prove(
    group: Mapping[str, Sequence[Exhibit]], told: Callable[[str], None], *, quick: bool = False
) -> dict[str, Capability]:
    """Try every layout and method; what fails is recorded with its reason.

    Args:
        group: architectures with their exhibits.
        told: called with a line about each thing that was tried.
        quick: only the layouts at which every architecture must hold.
    """
    with tempfile.TemporaryDirectory() as root:
        made = {name: Specimen.of(exhibits, Path(root)) for name, exhibits in group.items()}
        layouts = {name: layout_names(experts=bool(each.mixtures), quick=quick) for name, each in made.items()}
        found: dict[str, dict[str, Any]] = {}
        for layout in dict.fromkeys(layout for names in layouts.values() for layout in names):
            cases = [case for name, each in made.items() if layout in layouts[name] for case in each.at(layout)]
            found[layout] = outcomes(_logits_and_weights, cases, layout)
            worst = max((value for value in found[layout].values() if isinstance(value, float)), default=float("nan"))
            told(f"{layout}: {len(cases)} cases, logits within {worst:.1e}")
        biases, fp8 = _bitfit(made), _fp8(made, Path(root))
        predicted = proven_predictions(made, Path(root) / "mtp", told)
    return {
        name: _capability(each, layouts[name], found, biases[name], fp8[name], mtp=name in predicted)
        for name, each in made.items()
    }


def layout_names(*, experts: bool, quick: bool) -> tuple[str, ...]:
    """The layouts to try."""
    if quick:
        return EXPERTS_EVERYWHERE if experts else EVERYWHERE
    return layouts_for(experts=experts)


def is_current(capability: Capability, exhibits: Sequence[Exhibit], *, quick: bool = False) -> bool:
    """Whether a record was made of these very cases, at all layouts that there are or those of `quick`."""
    tried = {*capability.layouts, *capability.unproven}
    experts = any(EP in layout_fields(name) for name in tried)
    cases = tuple(exhibit.name for exhibit in exhibits)
    return capability.cases == cases and tried >= {*layout_names(experts=experts, quick=quick)}


def outcomes(attempt: Attempt, cases: Sequence[FamilyCase], layout: str) -> dict[str, Any]:
    """Case -> what `attempt(case, fields)` returned on rank 0, or `Failed`; what fails in company is tried alone."""
    fields = layout_fields(layout)
    if not cases:
        return {}
    try:
        found: dict[str, Any] = run_ranks(
            ranks_of(fields), _one_after_another, attempt, cases, fields, timeout=SECONDS * len(cases)
        )[0]
    except BridgeError as error:
        found = {case.name: Failed(_reason(error)) for case in cases}
    if len(cases) > 1:
        for case in cases:
            if isinstance(found[case.name], Failed):
                found |= outcomes(attempt, [case], layout)
    return found


def _one_after_another(attempt: Attempt, cases: Sequence[FamilyCase], fields: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in cases:
        try:
            found[case.name] = attempt(case, fields)
        except (BridgeError, FamilyMismatch) as error:
            found[case.name] = Failed(_reason(error))
    return found


def _reason(error: Exception) -> str:
    """An error in one line, without the paths and rank numbers that differ from run to run."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"\[rank [\d, ]+\] ", "", " ".join(lines[:2]) if len(lines) < 6 else lines[-1])
    text = re.sub(r"/\S*/", "", text)
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


def _logits_and_weights(case: FamilyCase, fields: Mapping[str, Any]) -> float:
    difference = compare_in_rank([case], fields, LAYER_SPEC)[case.name]
    if not difference < TOLERANCE:
        raise FamilyMismatch(f"{case.name}: logits differ from transformers' by {difference:.1e}")
    return difference


def _capability(
    specimen: Specimen,
    names: Sequence[str],
    found: Mapping[str, Mapping[str, Any]],
    bitfit: str,
    fp8: str,
    *,
    mtp: bool,
) -> Capability:
    layouts: dict[str, float] = {}
    unproven: dict[str, str] = {}
    for layout in names:
        results = [found[layout][case.name] for case in specimen.at(layout)]
        failed = next((each for each in results if isinstance(each, Failed)), None)
        if failed is None:
            layouts[layout] = float(f"{max(results):.1e}")
        else:
            unproven[layout] = failed.reason
    return Capability(
        cases=tuple(case.name for case in specimen.cases),
        layouts=layouts,
        unproven=unproven,
        peft={"BitFit": bitfit},
        low_bit={"FP8": fp8},
        mtp=mtp,
        layer_spec=LAYER_SPEC,
        date=datetime.now(UTC).date().isoformat(),
        versions={package: version(package) for package in ("torch", "megatron-core", "transformers")},
    )


def _bitfit(made: Mapping[str, Specimen]) -> dict[str, str]:
    """What BitFit does to each architecture's first case that has biases."""
    cases = [case for each in made.values() for case in each.cases]
    single = outcomes(train_biases, cases, "single")
    first = {name: _first_with_biases(each, single) for name, each in made.items()}
    told = dict.fromkeys(made, "nothing to train")
    # Training a mixture over tensor-parallel ranks takes sequence parallelism, and with it a gradient exchange that is
    # not part of this.
    for layout, chosen in _by_layout(made, {name: case for name, case in first.items() if case is not None}).items():
        spread = outcomes(train_biases, list(chosen.values()), layout)
        for name, case in chosen.items():
            failed = next((each for each in (single[case.name], spread[case.name]) if isinstance(each, Failed)), None)
            proven = f"one step at single and {layout} changes the biases and nothing else"
            told[name] = f"not proven: {failed.reason}" if failed else proven
    return told


def _by_layout(made: Mapping[str, Specimen], chosen: Mapping[str, FamilyCase]) -> dict[str, dict[str, FamilyCase]]:
    """One case per architecture, by the two ranks that divide it: experts, or else tensors."""
    layouts: dict[str, dict[str, FamilyCase]] = {"tp2": {}, "ep2": {}}
    for name, case in chosen.items():
        layouts["ep2" if case.name in made[name].mixtures else "tp2"][name] = case
    return layouts


def _first_with_biases(specimen: Specimen, single: Mapping[str, Any]) -> FamilyCase | None:
    def has_none(result: Any) -> bool:
        return isinstance(result, Failed) and "must have some" in result.reason

    return next((case for case in specimen.cases if not has_none(single[case.name])), None)


def _fp8(made: Mapping[str, Specimen], root: Path) -> dict[str, str]:
    """What becomes of each architecture's first case with its matrices stored in FP8 blocks."""
    stored = {name: in_fp8(each.cases[0], root / "fp8" / name) for name, each in made.items()}
    told = {}
    for layout, of_kind in _by_layout(made, stored).items():
        found = outcomes(read_low_bit, list(of_kind.values()), layout)
        for name, case in of_kind.items():
            result = found[case.name]
            failed = f"not proven: {result.reason}" if isinstance(result, Failed) else None
            told[name] = failed or f"read at {layout}, each weight what torch makes of it"
    return told
