"""Weight rules and the table that holds a family's."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron.bridge.conversion.entries import base_name, with_entries
from megatron.bridge.conversion.names import Indices, NamePattern, skeleton
from megatron.bridge.conversion.shards import REPLICATED, Expert, ShardRule
from megatron.bridge.conversion.transforms import Identity, Shape, Transform
from megatron.bridge.errors import BridgeError

# What the name of a whole sub-tree ends in.
TREE = ".**"


@dataclass(frozen=True)
class WeightRule:
    """Joins one Megatron weight to one or more Hugging Face weights, for every value of the names' indices.

    Args:
        megatron: canonical Megatron name, as in its checkpoints, e.g. `decoder.layers.{l}.mlp.linear_fc2.weight`.
        hf: Hugging Face name or names, in the order the transform takes them. `NAME[{e}]` is entry e of the leading
            axis of a weight that stacks all experts.
            Where both names end in `.**` the rule is for every weight below, by the same name on both sides and whole
            on every rank: a module that Megatron runs as transformers wrote it.
        transform: the tensor function between the two sides.
        shard: how parallel ranks divide the Megatron weight; `Expert` for every name with `{e}`, and for no other.
        keeps_dtype: an export to another dtype leaves this weight in its own (routing biases that must stay fp32).
        optional: the model may lack this weight, in a table that serves several variants of a family.
        tree: the rule's own name where this is one weight below a `.**`.
    """

    megatron: str
    hf: str | tuple[str, ...]
    transform: Transform = Identity()
    shard: ShardRule = REPLICATED
    keeps_dtype: bool = False
    optional: bool = False
    tree: str | None = None

    def __post_init__(self) -> None:
        spelled = {name: set(NamePattern(name).indices) for name in (self.megatron, *self.hf_names)}
        if len(set(map(frozenset, spelled.values()))) > 1:
            raise BridgeError(f"weight rule {self.megatron!r}: both sides must use the same indices, not {spelled}")
        if isinstance(self.shard, Expert) != ("e" in self.pattern.indices):
            raise BridgeError(
                f"weight rule {self.megatron!r}: a weight per expert {{e}} needs the shard rule Expert, and no other "
                f"weight may have it; it has {self.shard}"
            )
        trees = [name.endswith(TREE) for name in (self.megatron, *self.hf_names)]
        if any(trees) and (not all(trees) or (self.transform, self.shard) != (Identity(), REPLICATED)):
            raise BridgeError(
                f"weight rule {self.megatron!r}: a sub-tree ({TREE}) has one on either side, and its weights are the "
                f"same and whole on every rank; it has {self.hf}, {self.transform} and {self.shard}"
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

    @property
    def is_tree(self) -> bool:
        """Whether the rule is for every weight below a name."""
        return self.megatron.endswith(TREE)

    def below(self, name: str, side: str) -> "WeightRule | None":
        """The rule of one weight of this sub-tree, or None for a weight outside it.

        Args:
            name: the weight's.
            side: the tree's name on the side that `name` is of, `.**` included.
        """
        top = side.removesuffix(TREE) + "."
        if not self.is_tree or not name.startswith(top):
            return None
        rest = name.removeprefix(top)
        own, hf = (f"{each.removesuffix(TREE)}.{rest}" for each in (self.megatron, self.hf_names[0]))
        return replace(self, megatron=own, hf=hf, tree=self.megatron)

    def renamed(self, megatron: str, hf: Mapping[str, str]) -> "WeightRule":
        """The rule with other names.

        Args:
            megatron: is put before the Megatron name.
            hf: beginnings of Hugging Face names -> what they become.
        """
        return replace(self, megatron=megatron + self.megatron, hf=tuple(_renamed(name, hf) for name in self.hf_names))


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for own, other in prefixes.items():
        if name.startswith(own):
            return other + name.removeprefix(own)
    return name


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
        spellings: (prefix, other prefix): files of some versions of transformers begin names in another way.
    """

    rules: tuple[WeightRule, ...]
    tied: tuple[Tied, ...] = ()
    ignored: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        seen: dict[str, WeightRule] = {}
        for rule in self.rules:
            if rule.megatron in seen:
                raise BridgeError(f"two weight rules for {rule.megatron!r}: {seen[rule.megatron].hf} and {rule.hf}")
            seen[rule.megatron] = rule

    @classmethod
    def of(
        cls,
        *fragments: WeightRule | Iterable[WeightRule],
        tied: Sequence[Tied] = (),
        ignored: Sequence[str] = (),
        spellings: Sequence[tuple[str, str]] = (),
    ) -> "WeightTable":
        """A table from single rules and from fragments that families share."""
        rules: list[WeightRule] = []
        for fragment in fragments:
            rules.extend([fragment] if isinstance(fragment, WeightRule) else fragment)
        return cls(tuple(rules), tuple(tied), tuple(ignored), tuple(spellings))

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
        for rule in self._trees:
            if (own := rule.below(megatron, rule.megatron)) is not None:
                return own, {}
        return None

    @cached_property
    def _trees(self) -> tuple[WeightRule, ...]:
        return tuple(rule for rule in self.rules if rule.is_tree)

    def grown(self, hf: Iterable[str]) -> "WeightTable":
        """The table with every sub-tree replaced by a rule for each of these Hugging Face weights below it."""
        names = list(hf)
        rules: list[WeightRule] = []
        for rule in self.rules:
            below = (rule.below(name, rule.hf_names[0]) for name in names) if rule.is_tree else (rule,)
            rules += [own for own in below if own is not None]
        return replace(self, rules=tuple(rules))

    def under(self, megatron: str, hf: Mapping[str, str]) -> "WeightTable":
        """The table of a model that is part of a larger one.

        Args:
            megatron: what its Megatron names begin with there.
            hf: what its Hugging Face names begin with by itself -> in the larger model.
        """
        return replace(
            self,
            rules=tuple(rule.renamed(megatron, hf) for rule in self.rules),
            tied=tuple(Tied(_renamed(tie.name, hf), _renamed(tie.to, hf)) for tie in self.tied),
            ignored=tuple(_renamed(name, hf) for name in self.ignored),
        )

    def spelled(self, hf: Iterable[str]) -> "WeightTable":
        """The table with names as these Hugging Face weights spell them."""
        table, names = self, list(hf) if self.spellings else []
        for prefix, other in self.spellings:
            if any(name.startswith(other) for name in names):
                table = table.under("", {prefix: other})
        return table

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
