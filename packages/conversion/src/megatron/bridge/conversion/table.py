"""Weight rules and the table that holds a family's."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron.bridge.conversion.entries import base_name, with_entries
from megatron.bridge.conversion.names import Indices, NamePattern, skeleton
from megatron.bridge.conversion.shards import REPLICATED, Expert, ShardRule
from megatron.bridge.conversion.transforms import Identity, Shape, Transform
from megatron.bridge.errors import BridgeError


@dataclass(frozen=True)
class WeightRule:
    """Joins one Megatron weight to one or more Hugging Face weights, for every value of the names' indices.

    Args:
        megatron: canonical Megatron name, as in its checkpoints, e.g. `decoder.layers.{l}.mlp.linear_fc2.weight`.
        hf: Hugging Face name or names, in the order the transform takes them. `NAME[{e}]` is entry e of the leading
            axis of a weight that stacks all experts.
        transform: the tensor function between the two sides.
        shard: how parallel ranks divide the Megatron weight; `Expert` for every name with `{e}`, and for no other.
        keeps_dtype: an export to another dtype leaves this weight in its own (routing biases that must stay fp32).
        optional: the model may lack this weight, in a table that serves several variants of a family.
    """

    megatron: str
    hf: str | tuple[str, ...]
    transform: Transform = Identity()
    shard: ShardRule = REPLICATED
    keeps_dtype: bool = False
    optional: bool = False

    def __post_init__(self) -> None:
        spelled = {name: set(NamePattern(name).indices) for name in (self.megatron, *self.hf_names)}
        if len(set(map(frozenset, spelled.values()))) > 1:
            raise BridgeError(f"weight rule {self.megatron!r}: both sides must use the same indices, not {spelled}")
        if isinstance(self.shard, Expert) != ("e" in self.pattern.indices):
            raise BridgeError(
                f"weight rule {self.megatron!r}: a weight per expert {{e}} needs the shard rule Expert, and no other "
                f"weight may have it; it has {self.shard}"
            )

    @cached_property
    def hf_names(self) -> tuple[str, ...]:
        """The Hugging Face names as a tuple."""
        return (self.hf,) if isinstance(self.hf, str) else self.hf

    @cached_property
    def pattern(self) -> NamePattern:
        """The Megatron name as a pattern."""
        return NamePattern(self.megatron)

    @cached_property
    def hf_patterns(self) -> tuple[NamePattern, ...]:
        """The Hugging Face names as patterns."""
        return tuple(map(NamePattern, self.hf_names))

    def hf_for(self, indices: Indices) -> tuple[str, ...]:
        """The Hugging Face names at `indices`."""
        return tuple(pattern.format(indices) for pattern in self.hf_patterns)


@dataclass(frozen=True)
class Tied:
    """The Hugging Face weight `name` is the same tensor as `to`; a file may hold it or not."""

    name: str
    to: str


@dataclass(frozen=True)
class WeightTable:
    """All that a family says about its weights.

    Args:
        rules: one rule per kind of weight.
        tied: Hugging Face weights that repeat another one.
        ignored: Hugging Face weights, by pattern, that carry nothing Megatron needs (buffers of old checkpoints).
    """

    rules: tuple[WeightRule, ...]
    tied: tuple[Tied, ...] = ()
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        seen: dict[str, WeightRule] = {}
        for rule in self.rules:
            if rule.megatron in seen:
                raise BridgeError(f"two weight rules for {rule.megatron!r}: {seen[rule.megatron].hf} and {rule.hf}")
            seen[rule.megatron] = rule

    @classmethod
    def of(
        cls, *fragments: WeightRule | Iterable[WeightRule], tied: Sequence[Tied] = (), ignored: Sequence[str] = ()
    ) -> "WeightTable":
        """A table from single rules and from fragments that families share."""
        rules: list[WeightRule] = []
        for fragment in fragments:
            rules.extend([fragment] if isinstance(fragment, WeightRule) else fragment)
        return cls(tuple(rules), tuple(tied), tuple(ignored))

    @cached_property
    def _by_skeleton(self) -> dict[str, list[WeightRule]]:
        index = defaultdict(list)
        for rule in self.rules:
            index[rule.pattern.skeleton].append(rule)
        return index

    def resolve(self, megatron: str) -> tuple[WeightRule, Indices] | None:
        """The rule for a canonical Megatron name with the indices it was met at, or None."""
        for rule in self._by_skeleton.get(skeleton(megatron), ()):
            indices = rule.pattern.match(megatron)
            if indices is not None:
                return rule, indices
        return None

    def entries(self, hf: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """A checkpoint's weights with every weight that the rules take entry by entry replaced by its entries."""
        stacked = {base_name(name) for rule in self.rules for name in rule.hf_names if base_name(name) != name}
        return with_entries(hf, [NamePattern(name) for name in stacked]) if stacked else hf

    @cached_property
    def _ignored_patterns(self) -> tuple[NamePattern, ...]:
        return tuple(map(NamePattern, self.ignored))

    def ignores(self, hf: str) -> bool:
        """Whether the table says, by name, that this Hugging Face weight is not needed."""
        return any(pattern.match(hf) is not None for pattern in self._ignored_patterns)
