"""The smallest change that ends a violation, found by trying changes and checking each anew."""

import copy
import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.bridge.mimo.candidates import candidates
from megatron.bridge.mimo.violations import Violation, find_violations

if TYPE_CHECKING:
    from megatron.bridge.mimo.parallelism import MimoParallelismConfig

# How unwelcome a change is: data parallelism and offsets are arithmetic, other sizes decide what fits in memory and how
# fast it runs, and the number of ranks is what the user has.
_WEIGHTS = {"data_parallel": 1.0, "rank_offset": 1.0, "expert_parallel": 1.0, "deployment_mode": 3.0, "world_size": 4.0}
_OTHER_SIZE = 3.0
_PER_DOUBLING = 0.25
_ELSEWHERE = 1.0  # a change to a module that is not at fault
# Violations that another number of ranks may end.
_LAUNCH_KINDS = {"ranks", "beyond", "idle"}

type _Key = tuple[str, str | None]


@dataclass(frozen=True)
class Change:
    """`field` becomes `value`: of a module's layout; of the placement, or the world's size, when `module` is None."""

    module: str | None
    field: str
    value: int | str


@dataclass(frozen=True)
class Fix:
    """Changes that belong together."""

    changes: tuple[Change, ...]

    @classmethod
    def together(cls, fixes: "Iterable[Fix]") -> "Fix":
        """All changes of `fixes`, later ones in place of earlier ones."""
        last = {(change.module, change.field): change for fix in fixes for change in fix.changes}
        return cls(tuple(last.values()))

    def apply(self, config: "MimoParallelismConfig", world_size: int) -> "tuple[MimoParallelismConfig, int]":
        """A changed copy of the placement, and the number of ranks to start."""
        changed = copy.copy(config)
        changed.module_parallelisms = {name: copy.copy(each) for name, each in config.module_parallelisms.items()}
        for change in self.changes:
            if change.module is not None:
                setattr(changed.module_parallelisms[change.module], change.field, change.value)
            elif change.field == "world_size":
                world_size = int(change.value)
            else:
                setattr(changed, change.field, change.value)
        return changed, world_size

    def __str__(self) -> str:
        settings: dict[str | None, list[str]] = {}
        starts = ""
        for change in self.changes:
            if change.field == "world_size":
                starts = f"start {change.value} rank{'s' * (change.value != 1)}"
            else:
                settings.setdefault(change.module, []).append(f"{change.field}={change.value!r}")
        parts = [
            f"{_listed(values)} for {module!r}" if module is not None else _listed(values)
            for module, values in settings.items()
        ]
        return " and ".join(filter(None, [f"set {_listed(parts)}" if parts else "", starts]))


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def smallest_fixes(config: "MimoParallelismConfig", world_size: int, found: list[Violation]) -> list[Fix]:
    """For each violation the cheapest change that ends it and starts no other, given the changes before it.

    A violation that an earlier change ends gets that change.
    """
    ended: dict[_Key, Fix] = {}
    keys = {violation.key for violation in found}
    for violation in found:
        if violation.key in keys:
            fix, left = _smallest_fix(config, world_size, violation, keys)
            config, world_size = fix.apply(config, world_size)
            ended |= dict.fromkeys(keys - left, fix)
            keys = left
    return [ended[violation.key] for violation in found]


def _smallest_fix(
    config: "MimoParallelismConfig", world_size: int, violation: Violation, before: set[_Key]
) -> tuple[Fix, set[_Key]]:
    """The cheapest change that ends `violation` and starts none, and the violations that it leaves."""
    # The count keeps their order among equals.
    tried: list[tuple[float, int, int, Fix, set[_Key]]] = []
    for changes in candidates(config, world_size):
        fix = Fix(tuple(Change(*where, value) for where, value in changes.items()))
        after = {each.key for each in find_violations(*fix.apply(config, world_size))}
        if violation.key not in after and after <= before:
            tried.append((_cost(fix, config, world_size, after, violation.module), len(after), len(tried), fix, after))
    return min(tried)[3:]  # never empty: the last candidate leaves none


def _cost(fix: Fix, config: "MimoParallelismConfig", world_size: int, after: set[_Key], at_fault: str | None) -> float:
    launch = [change.value for change in fix.changes if change.field == "world_size"]
    only_launch = len(launch) == len(fix.changes)
    if only_launch and int(launch[0]) > world_size and not any(kind in _LAUNCH_KINDS for kind, _ in after):
        return _PER_DOUBLING  # the modules agree on how many ranks they need, and fewer were started
    elsewhere = sum(change.module not in (None, at_fault) for change in fix.changes)
    return elsewhere * _ELSEWHERE + math.fsum(_costs(fix, config, world_size))


def _costs(fix: Fix, config: "MimoParallelismConfig", world_size: int) -> Iterator[float]:
    for change in fix.changes:
        weight = _WEIGHTS.get(change.field, _OTHER_SIZE)
        if change.field == "deployment_mode":
            yield weight * (1 if change.value == config.mode else 2)
        elif change.field == "llm_module_name":
            yield weight * _distance(config.llm_module_name, str(change.value))
        else:
            layout = config.module_parallelisms.get(change.module or "")
            old = world_size if layout is None else getattr(layout, change.field)
            sizes = change.field != "rank_offset" and isinstance(old, int) and old > 0
            yield weight + (_PER_DOUBLING * abs(math.log2(int(change.value) / old)) if sizes else 0.0)


def _distance(name: str, other: str) -> float:
    near = difflib.SequenceMatcher(None, str(name).casefold(), other.casefold()).ratio()
    return 1.0 - near if near >= 0.6 else 1.0
