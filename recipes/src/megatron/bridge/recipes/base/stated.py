"""A value and who says so."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stated:
    """One value of a recipe.

    Attributes:
        value: as YAML can hold it.
        source: the paper or model card that states it; or `ours`, and why.
    """

    value: Any
    source: str


def stated(source: str, values: Mapping[str, Any]) -> dict[str, Stated]:
    """Several values of one source."""
    return {name: Stated(value, source) for name, value in values.items()}
