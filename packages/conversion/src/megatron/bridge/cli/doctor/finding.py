"""What the doctor says about one thing it looked at."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """Whether a part works; `untried` is installed, but there was no time to import it."""

    WORKS = "works"
    ABSENT = "absent"
    BROKEN = "broken"
    UNTRIED = "untried"


class Section(StrEnum):
    """Where a finding is shown."""

    REQUIRED = "required"
    OURS = "our distributions"
    OPTIONAL = "optional"
    ENVIRONMENT = "environment"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the report.

    Attributes:
        required: nothing works as long as this does not.
        proof: what was done to know that it works.
        reason: why it is broken.
        purpose: what it is for.
        remedy: how to get or mend it.
    """

    section: Section
    name: str
    state: State
    required: bool = False
    version: str | None = None
    proof: str | None = None
    reason: str | None = None
    purpose: str | None = None
    remedy: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {field: getattr(self, field) for field in self.__dataclass_fields__}


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether every required part works."""
    return all(finding.state is State.WORKS for finding in findings if finding.required)
