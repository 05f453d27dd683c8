"""What is installed, read from distribution metadata; nothing is imported."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import Distribution, distributions

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

OUR_BASE = "megatron-bridge-conversion"


@cache
def installed() -> Mapping[str, Distribution]:
    """Installed distributions by canonical name; of two with one name the one that imports see (first on the path)."""
    found: dict[str, Distribution] = {}
    for distribution in distributions():
        if name := distribution.name:  # absent from the metadata of a half-deleted distribution
            found.setdefault(canonicalize_name(name), distribution)
    return found


def version(*names: str) -> str | None:
    """Version of the first of these distributions that is installed, or None."""
    return next((installed()[name].version for name in names if name in installed()), None)


def tested_range(name: str) -> SpecifierSet:
    """The versions of `name` that megatron-bridge-conversion declares; any version when it declares none."""
    ours = installed().get(OUR_BASE)
    requirements = map(Requirement, (ours.requires if ours else None) or [])
    return next((each.specifier for each in requirements if canonicalize_name(each.name) == name), SpecifierSet())
