"""Whether installed versions suit each other: what `pip check` asks, with the requirements that contradict named."""

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron.bridge.cli.doctor.installed import installed


@dataclass(frozen=True)
class Unmet:
    """`requirer` needs `distribution` in the versions `specifier`, but `present` is installed (None: nothing)."""

    requirer: str
    distribution: str
    specifier: str
    present: str | None

    def __str__(self) -> str:
        present = f"{self.present} is installed" if self.present else "it is not installed"
        return f"{self.requirer} needs {self.distribution}{self.specifier}, but {present}"


@dataclass(frozen=True)
class Check:
    """Distributions that were looked at, and what they lack."""

    seen: frozenset[str]
    unmet: tuple[Unmet, ...]


def check_requirements(roots: Collection[str], *, follow: bool = True) -> Check:
    """Check the requirements of the distributions `roots` (canonical names) and, with `follow`, of all they need.

    Requirements of extras count where another distribution asks for that extra.
    """
    waiting = deque((root, frozenset[str]()) for root in roots)
    seen: set[tuple[str, frozenset[str]]] = set()
    unmet: dict[Unmet, None] = {}
    while waiting:
        name, extras = waiting.popleft()
        if (name, extras) in seen or name not in installed():
            continue
        seen.add((name, extras))
        for requirement in applicable(name, extras):
            needed = canonicalize_name(requirement.name)
            if (lack := _lack(name, requirement)) is not None:
                unmet[lack] = None
            elif follow:
                waiting.append((needed, frozenset(requirement.extras)))
    return Check(frozenset(name for name, _ in seen), tuple(unmet))


def applicable(name: str, extras: Collection[str] = ()) -> Iterator[Requirement]:
    """Requirements of an installed distribution whose markers hold here, those of `extras` among them."""
    for text in installed()[name].requires or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def _lack(name: str, requirement: Requirement) -> Unmet | None:
    distribution = installed().get(canonicalize_name(requirement.name))
    present = distribution.version if distribution else None
    if present is not None and requirement.specifier.contains(present, prereleases=True):
        return None
    requirer = installed()[name]
    return Unmet(f"{requirer.name} {requirer.version}", requirement.name, str(requirement.specifier), present)


def demands_on(name: str) -> dict[str, SpecifierSet]:
    """What every installed distribution demands of the version of `name`, by distribution."""
    demands: dict[str, SpecifierSet] = {}
    for requirer in installed():
        for requirement in applicable(requirer):
            if canonicalize_name(requirement.name) == name and requirement.specifier:
                demands[requirer] = demands.get(requirer, SpecifierSet()) & requirement.specifier
    return demands


def advice(unmet: Unmet) -> str:
    """How to bring the lacking distribution to a version that suits everyone, or who stands in the way."""
    name = canonicalize_name(unmet.distribution)
    demands = demands_on(name)
    together = SpecifierSet(unmet.specifier)  # an extra's, perhaps, which `demands` does not know
    for demand in demands.values():
        together &= demand
    if satisfiable(together):
        return f"uv pip install '{name}{together}'"
    listed = ", ".join(f"{requirer} ({demand})" for requirer, demand in sorted(demands.items()))
    return f"no version of {name} suits all of {listed}: upgrade or uninstall one of these"


def satisfiable(specifiers: SpecifierSet) -> bool:
    """Whether some version satisfies all; enough to try each bound, the next one after it, and zero."""
    bounds = [specifier.version.removesuffix(".*") for specifier in specifiers]
    candidates = ["0", *bounds, *(f"{Version(bound).base_version}.0.1" for bound in bounds)]
    return any(specifiers.contains(candidate, prereleases=True) for candidate in candidates)
