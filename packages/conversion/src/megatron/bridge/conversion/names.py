"""Weight names with indices: `decoder.layers.{l}.mlp.linear_fc1.weight`, `model.layers.{l+1}.norm.weight`.

`{l}` stands for a layer, `{e}` for an expert; an offset shifts the index, so that both sides of a rule can count from
different places. `{l=0,2}` stands for these layers only, where others have a rule of their own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

_INDEX = re.compile(r"\{([a-z])(?:\+(\d+))?(?:=(\d+(?:,\d+)*))?\}")
# A part between dots, or the entry of a stacked weight in brackets.
_DIGITS = re.compile(r"(?<![^.[])\d+(?![^].])")

type Indices = Mapping[str, int]


def skeleton(name: str) -> str:
    """`name` with every numeric part replaced by `#`: what names that differ only in indices have in common."""
    return _DIGITS.sub("#", name)


@dataclass(frozen=True)
class NamePattern:
    """A weight name in which `{x}` or `{x+k}` stands for an index, and `{x=i,j}` for one of those given."""

    text: str

    @cached_property
    def indices(self) -> tuple[str, ...]:
        """Index variables, in order of appearance."""
        return tuple(match[1] for match in _INDEX.finditer(self.text))

    @cached_property
    def skeleton(self) -> str:
        """The pattern with `#` for each index, comparable to `skeleton(name)`."""
        return skeleton(_INDEX.sub("#", self.text))

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        parts, last = [], 0
        for match in _INDEX.finditer(self.text):
            parts += [re.escape(self.text[last : match.start()]), r"(\d+)"]
            last = match.end()
        return re.compile("".join(parts) + re.escape(self.text[last:]))

    @cached_property
    def _offsets(self) -> tuple[int, ...]:
        return tuple(int(match[2] or 0) for match in _INDEX.finditer(self.text))

    @cached_property
    def _allowed(self) -> dict[str, frozenset[int]]:
        """The values of an index variable, where the pattern gives them."""
        return {match[1]: frozenset(map(int, match[3].split(","))) for match in _INDEX.finditer(self.text) if match[3]}

    def offset(self, variable: str) -> int:
        """What is added to an index variable; 0 where the pattern has no such variable."""
        return dict(zip(self.indices, self._offsets, strict=True)).get(variable, 0)

    def match(self, name: str) -> dict[str, int] | None:
        """The indices for which this pattern spells `name`, or None."""
        found = self._regex.fullmatch(name)
        if found is None:
            return None
        indices: dict[str, int] = {}
        for variable, digits, offset in zip(self.indices, found.groups(), self._offsets, strict=True):
            value = int(digits) - offset
            if value < 0 or indices.setdefault(variable, value) != value:
                return None
            if value not in self._allowed.get(variable, (value,)):
                return None
        return indices

    @cached_property
    def _pieces(self) -> tuple[str, ...]:
        """The text before, between and after the indices."""
        return tuple(_INDEX.sub("{", self.text).split("{"))

    def format(self, indices: Indices) -> str:
        """The name this pattern spells for `indices`."""
        first, *rest = self._pieces
        for variable, offset, piece in zip(self.indices, self._offsets, rest, strict=True):
            first += f"{indices[variable] + offset}{piece}"
        return first
