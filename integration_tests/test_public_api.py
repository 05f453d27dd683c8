"""The snapshots of public names are those of the sources: a change to them is seen, and told in the changelog."""

import pytest
from public_api import SNAPSHOTS, names_in, snapshots

RENEW = (
    "public names have changed: run `just api`, look at the difference, tell it in CHANGELOG.md, and commit all of it"
)


def test_the_snapshots_are_current() -> None:
    held = {file.name: file.read_text("utf-8") for file in SNAPSHOTS.glob("*.txt")}
    assert held == snapshots(), RENEW


SOURCE = '''
"""A module."""
import os
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import torch
    hidden: int = 3
type Pair = tuple[int, int]
LIMIT: int = 3
TABLE = {}
_private = 1
def work(a: int, /, *b: str, c: float = 1e-3, **d: object) -> "torch.Tensor": ...
def _inner(): ...
@dataclass(frozen=True)
class Thing(Base):
    """A thing."""
    size: int = 4
    _hidden: int = 5
    def __call__(self, x): ...
    @property
    def name(self) -> str: ...
    def _work(self): ...
'''
EXPECTED = [
    "type Pair = tuple[int, int]",
    "LIMIT: int",
    "TABLE",
    "def work(a: int, /, *b: str, c: float=0.001, **d: object) -> 'torch.Tensor'",
    "@dataclass(frozen=True) class Thing(Base)",
    "    size: int = 4",
    "    def __call__(self, x)",
    "    @property def name(self) -> str",
]


def test_a_line_says_all_that_callers_rely_on() -> None:
    assert names_in(SOURCE) == [f"    {line}" for line in EXPECTED]


@pytest.mark.parametrize(
    ("old", "new"),
    [("c: float = 1e-3", "c: float = 1e-4"), ("size: int", "size: float"), ("def name", "def title"), ("(Base)", "")],
)
def test_what_callers_would_notice_changes_it(old: str, new: str) -> None:
    assert names_in(SOURCE.replace(old, new)) != names_in(SOURCE)


def test_what_they_would_not_notice_does_not() -> None:
    assert names_in(SOURCE.replace("_hidden", "_other").replace("A thing.", "The thing.")) == names_in(SOURCE)
