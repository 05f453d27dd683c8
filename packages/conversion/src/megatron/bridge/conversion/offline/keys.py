"""Where a weight lies in a Megatron distributed checkpoint: its key, and its place along the layer axis.

Layers that are all alike are stacked: `decoder.layers.3.mlp.linear_fc2.weight` is entry 3 of the leading axis of
`decoder.layers.mlp.linear_fc2.weight`. Models whose layers differ in kind keep a key per layer.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from megatron.bridge.conversion.plan import Plan, PlanError
from megatron.bridge.conversion.table import WeightTable
from megatron.bridge.conversion.transforms import Shape

_LAYER_INDEX = ".layers.{l}."
_STACKED_INDEX = ".layers."
# Megatron-Core's linear layers keep a state besides weights: empty here, but its loaders ask for it.
_WITH_EXTRA_STATE = re.compile(r"(.*\.linear_\w+)\.weight")


class Place(NamedTuple):
    """A key and, when layers are stacked, the entry of the leading axis and the axis' length."""

    key: str
    layer: int | None = None
    layers: int | None = None

    @property
    def leading(self) -> Shape:
        """Offsets that come before the weight's own axes."""
        return () if self.layer is None else (self.layer,)

    def global_shape(self, shape: Shape) -> Shape:
        """The key's shape, given the weight's."""
        return shape if self.layers is None else (self.layers, *shape)


def places(plan: Plan) -> dict[str, Place]:
    """Canonical name -> place, for every weight of a plan.

    Raises:
        PlanError: a weight has an index besides its layer; how Megatron-Core stores those is not known here.
    """
    by_rule: dict[str, dict[int, Shape]] = defaultdict(dict)
    for item in plan:
        indices = item.rule.pattern.match(item.megatron) or {}
        if not indices:
            continue
        if set(indices) != {"l"} or _LAYER_INDEX not in item.rule.megatron:
            raise PlanError(f"{item.megatron}: the offline conversion cannot place it; convert without --offline")
        by_rule[item.rule.megatron][indices["l"]] = item.shape
    layers = 1 + max((layer for shapes in by_rule.values() for layer in shapes), default=-1)
    alike = all(len(shapes) == layers and len(set(shapes.values())) == 1 for shapes in by_rule.values())
    found = {}
    for item in plan:
        indices = item.rule.pattern.match(item.megatron) or {}
        if indices and alike:
            key = item.rule.megatron.replace(_LAYER_INDEX, _STACKED_INDEX)
            found[item.megatron] = Place(key, indices["l"], layers)
        else:
            found[item.megatron] = Place(item.megatron)
    return found


def extra_state_keys(found: Iterable[Place]) -> list[str]:
    """Keys of the (empty) extra state that Megatron-Core writes for each linear layer."""
    keys = []
    for place in found:
        linear = _WITH_EXTRA_STATE.fullmatch(place.key)
        if linear:
            shard = "shard_0_1" if place.layer is None else f"shard_{place.layer}_{place.layers}"
            keys.append(f"{linear[1]}._extra_state/{shard}")
    return keys


def stored_weights(table: WeightTable, keys: Mapping[str, Shape]) -> dict[str, tuple[Place, Shape]]:
    """Canonical name -> (place, shape) of what a checkpoint stores; keys that no rule knows keep their own name."""
    stacked = {
        rule.megatron.replace(_LAYER_INDEX, _STACKED_INDEX): rule
        for rule in table.rules
        if rule.pattern.indices == ("l",) and _LAYER_INDEX in rule.megatron
    }
    found: dict[str, tuple[Place, Shape]] = {}
    for key, shape in keys.items():
        rule = None if table.resolve(key) else stacked.get(key)
        if rule is None or not shape:
            found[key] = Place(key), shape
            continue
        for layer in range(shape[0]):
            found[rule.pattern.format({"l": layer})] = Place(key, layer, shape[0]), shape[1:]
    return found
