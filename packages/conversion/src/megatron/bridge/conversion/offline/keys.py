"""Where a weight lies in a Megatron distributed checkpoint: its key, and its place along the key's leading axes.

Layers that are all alike are stacked: `decoder.layers.3.mlp.linear_fc2.weight` is entry 3 of the leading axis of
`decoder.layers.mlp.linear_fc2.weight`. Models whose layers differ in kind keep a key per layer. Experts are always
stacked, behind the layers: expert 5 of layer 3 is entry (3, 5) of
`decoder.layers.mlp.experts.experts.linear_fc1.weight`, or entry 5 of
`decoder.layers.3.mlp.experts.experts.linear_fc1.weight`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import NamedTuple

from megatron.bridge.conversion.names import NamePattern, skeleton
from megatron.bridge.conversion.plan import Plan, PlanError
from megatron.bridge.conversion.shards import NamedBlocks
from megatron.bridge.conversion.table import WeightRule, WeightTable
from megatron.bridge.conversion.transforms import Shape

# What precedes the index of a layer, and of an expert; the index goes when the axis comes.
_LAYERS = ".layers."
_LAYER_INDEX = re.compile(r"\.layers\.\{l(?:=[\d,]+)?\}\.")
_EXPERT_INDEX = ".experts.{e}."
_STACKED_EXPERTS = ".experts."
# Layers of multi-token prediction have a key each, however alike they are.
_NEVER_STACKED = "mtp."
# Megatron-Core's linear layers keep a state besides weights: empty here, but its loaders ask for it.
_WITH_EXTRA_STATE = re.compile(r"(.*\.(?:linear_\w+|eh_proj))\.weight")


class Place(NamedTuple):
    """A key, and (entry, length) of each leading axis that comes before the weight's own."""

    key: str
    axes: tuple[tuple[int, int], ...] = ()

    @property
    def leading(self) -> Shape:
        """Offsets that come before the weight's own axes."""
        return tuple(entry for entry, _ in self.axes)

    def global_shape(self, shape: Shape) -> Shape:
        """The key's shape, given the weight's."""
        return (*(length for _, length in self.axes), *shape)


def places(plan: Plan) -> dict[str, Place]:
    """Canonical name -> place, for every weight of a plan.

    Raises:
        PlanError: a weight has an index besides its layer and expert; how Megatron-Core stores those is not known here.
    """
    refuse_named_blocks(item.rule for item in plan)
    experts = _expert_counts(plan)
    depths = _depths_of_like_layers(plan)
    found = {}
    for item in plan:
        indices, key, axes = item.indices, item.rule.megatron, []
        if _stackable(item.rule) and (depth := depths.get(_stack(item.rule))):
            key = _LAYER_INDEX.sub(_LAYERS, key)
            axes.append((indices["l"], depth))
        if _EXPERT_INDEX in key:
            key = key.replace(_EXPERT_INDEX, _STACKED_EXPERTS)
            axes.append((indices["e"], experts[item.rule.megatron, indices.get("l")]))
        if not set(indices) <= {"l", "e"} or "{e}" in key or ("{l" in key and not _LAYER_INDEX.search(key)):
            raise PlanError(f"{item.megatron}: the offline conversion cannot place it; convert without --offline")
        found[item.megatron] = Place(NamePattern(key).format(indices) if "{" in key else key, tuple(axes))
    return found


def refuse_named_blocks(rules: Iterable[WeightRule]) -> None:
    """Refuse weights that checkpoints hold in parts.

    Raises:
        PlanError: names the first of them.
    """
    for rule in rules:
        if isinstance(rule.shard, NamedBlocks):
            keys = ", ".join(f"{rule.megatron}.{name}" for name in rule.shard.names)
            raise PlanError(
                f"{rule.megatron}: Megatron checkpoints hold it in parts ({keys}), which the offline conversion cannot "
                "place; convert without --offline"
            )


def _stackable(rule: WeightRule) -> bool:
    return _LAYER_INDEX.search(rule.megatron) is not None and not rule.megatron.startswith(_NEVER_STACKED)


def _expert_counts(plan: Plan) -> dict[tuple[str, int | None], int]:
    """(rule, layer) -> experts."""
    counts: dict[tuple[str, int | None], int] = defaultdict(int)
    for item in plan:
        if "e" in item.indices:
            key = item.rule.megatron, item.indices.get("l")
            counts[key] = max(counts[key], item.indices["e"] + 1)
    return counts


def _stack(rule: WeightRule) -> str:
    """The stack of layers that a weight belongs to: `decoder`, or `encoder`."""
    return _LAYER_INDEX.split(rule.megatron)[0]


def _depths_of_like_layers(plan: Plan) -> dict[str, int]:
    """Stack -> layers, for the stacks in which every layer has the same weights in the same shapes."""
    held: dict[str, dict[tuple[str, int | None], dict[int, Shape]]] = defaultdict(lambda: defaultdict(dict))
    for item in plan:
        if _stackable(item.rule):
            held[_stack(item.rule)][item.rule.megatron, item.indices.get("e")][item.indices["l"]] = item.shape
    depths = {stack: 1 + max(max(shapes) for shapes in weights.values()) for stack, weights in held.items()}
    return {
        stack: depths[stack]
        for stack, weights in held.items()
        if all(len(shapes) == depths[stack] and len(set(shapes.values())) == 1 for shapes in weights.values())
    }


def extra_state_keys(found: Iterable[Place]) -> list[str]:
    """Keys of the (empty) extra state that Megatron-Core writes for each linear layer."""
    keys = []
    for place in found:
        linear = _WITH_EXTRA_STATE.fullmatch(place.key)
        if linear:
            entries, lengths = zip(*(place.axes or ((0, 1),)), strict=True)
            shard = f"shard_{'.'.join(map(str, entries))}_{'.'.join(map(str, lengths))}"
            keys.append(f"{linear[1]}._extra_state/{shard}")
    return keys


def stored_weights(table: WeightTable, keys: Mapping[str, Shape]) -> dict[str, tuple[Place, Shape]]:
    """Canonical name -> (place, shape) of what a checkpoint stores; keys that no rule knows keep their own name."""
    stacked = _stacked_forms(table)
    found: dict[str, tuple[Place, Shape]] = {}
    for key, shape in keys.items():
        met = None if table.resolve(key) else _stacked(key, shape, stacked)
        if met is None:
            found[key] = Place(key), shape
            continue
        pattern, indices, axes = met
        lengths = shape[: len(axes)]
        for entries in product(*map(range, lengths)):
            name = pattern.format(indices | dict(zip(axes, entries, strict=True)))
            found[name] = Place(key, tuple(zip(entries, lengths, strict=True))), shape[len(axes) :]
    return found


class _Form(NamedTuple):
    """A spelling of a rule's key in which some indices are axes."""

    key: NamePattern
    axes: tuple[str, ...]
    rule: WeightRule


def _stacked_forms(table: WeightTable) -> dict[str, list[_Form]]:
    """Every key under which a checkpoint may stack a rule's weights, by skeleton."""
    forms: dict[str, list[_Form]] = defaultdict(list)
    for rule in table.rules:
        for form in _forms(rule):
            forms[form.key.skeleton].append(form)
    return forms


def _forms(rule: WeightRule) -> Iterator[_Form]:
    single = rule.megatron
    if "e" in rule.pattern.indices:
        single = single.replace(_EXPERT_INDEX, _STACKED_EXPERTS)
        yield _Form(NamePattern(single), ("e",), rule)
    # Rules for some layers only are those of layers that differ.
    if _stackable(rule) and "{l}" in single:
        axes = ("l", "e") if single != rule.megatron else ("l",)
        yield _Form(NamePattern(_LAYER_INDEX.sub(_LAYERS, single)), axes, rule)


def _stacked(
    key: str, shape: Shape, forms: Mapping[str, list[_Form]]
) -> tuple[NamePattern, dict[str, int], tuple[str, ...]] | None:
    for form in forms.get(skeleton(key), ()):
        indices = form.key.match(key)
        if indices is not None and len(shape) >= len(form.axes) and all(shape):
            return form.rule.pattern, indices, form.axes
    return None
