"""Plans: a weight table met with what is really there, as pure data, with every weight on both sides accounted for."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from megatron.bridge.conversion.entries import without_entries
from megatron.bridge.conversion.names import Indices, NamePattern
from megatron.bridge.conversion.table import WeightRule, WeightTable
from megatron.bridge.conversion.transforms import Shape
from megatron.bridge.errors import BridgeError

_LISTED = 12  # names printed per kind of problem before "and N more"


class PlanError(BridgeError):
    """The table does not join the two sides one to one; the message lists what is left over on each."""


@dataclass(frozen=True)
class PlanItem:
    """One Megatron weight with the Hugging Face weights (or entries of stacked ones) it is made of.

    `shape` is the global shape, before tensor parallelism; `hf_shapes` follow `hf`; `indices` are the layer, expert and
    so on at which the rule was met.
    """

    megatron: str
    shape: Shape
    hf: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    rule: WeightRule
    indices: Indices = field(compare=False)

    @property
    def numel(self) -> int:
        """Elements of the global Megatron weight."""
        return prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """A proven one-to-one correspondence. Items come in Hugging Face order: embedding, layers, head.

    `tied` maps a Hugging Face name that may be written twice to the one it repeats.
    """

    items: tuple[PlanItem, ...]
    tied: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[PlanItem]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """Every Hugging Face weight of the plan with its shape, in order, as files hold them."""
        return without_entries(
            {name: shape for item in self for name, shape in zip(item.hf, item.hf_shapes, strict=True)}
        )


@dataclass
class _Problems:
    """Everything wrong with a plan, by kind, so that one error tells all."""

    kinds: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, culprit: str) -> None:
        self.kinds[kind].append(culprit)

    def raise_if_any(self, what: str) -> None:
        if not self.kinds:
            return
        lines = [f"{what}: the two sides do not correspond one to one, so nothing was converted"]
        for kind, culprits in self.kinds.items():
            lines.append(f"  {kind} ({len(culprits)}):")
            lines += [f"    {culprit}" for culprit in culprits[:_LISTED]]
            if len(culprits) > _LISTED:
                lines.append(f"    ... and {len(culprits) - _LISTED} more")
        raise PlanError("\n".join(lines))


_NO_RULE_MEGATRON = "Megatron weights without a rule (they would stay random; add a WeightRule to the family's table)"
_NO_RULE_HF = "Hugging Face weights without a rule (they would be lost; add a WeightRule, or name them in `ignored`)"
_ABSENT_HF = (
    "Hugging Face weights that a rule needs and the checkpoint lacks (fetch it again, or correct its config.json)"
)
_UNUSED_RULE = "rules that meet no Megatron weight (the table was built for another configuration)"
_SHAPE = "shapes that disagree (the configuration does not describe this checkpoint)"
_TWICE = "Hugging Face weights claimed by more than one Megatron weight"
_GAP = "layers or experts missing from the Megatron model"


def import_plan(
    table: WeightTable, hf: Mapping[str, Shape], megatron: Mapping[str, Shape], what: str = "import"
) -> Plan:
    """Join a Hugging Face checkpoint's weights to a Megatron model's.

    Args:
        table: the family's rules.
        hf: every weight of the checkpoint with its shape.
        megatron: every weight of the model, by canonical name, with its global shape.
        what: named in errors.

    Raises:
        PlanError: a weight on either side is unaccounted for, claimed twice or of another shape.
    """
    problems = _Problems()
    hf = table.entries(hf)
    items = _join(table, megatron, problems)
    tied = {tie.name: tie.to for tie in table.tied}
    used = Counter(name for item in items for name in item.hf)
    for item in items:
        absent = [name for name in item.hf if name not in hf]
        for name in absent:
            problems.add(_ABSENT_HF, f"{name} (for {item.megatron})")
        if not absent:
            _check_shapes(item, hf, problems)
    for name in hf:
        if name not in used and name not in tied and not table.ignores(name):
            problems.add(_NO_RULE_HF, f"{name} {list(hf[name])}")
    _check_once(used, problems)
    problems.raise_if_any(what)
    return Plan(_in_order(table, items), {name: to for name, to in tied.items() if name in hf})


def export_plan(
    table: WeightTable, megatron: Mapping[str, Shape], what: str = "export", *, of_all_layers: bool = True
) -> Plan:
    """Derive the Hugging Face weights that a Megatron model holds, with their shapes.

    Args:
        table: the family's rules.
        megatron: every weight of the model, by canonical name, with its global shape.
        what: named in errors.
        of_all_layers: refuse weights of which some layers or experts have none; adapters may be on some alone.

    Raises:
        PlanError: a Megatron weight has no rule, a rule meets no weight, or a layer is missing.
    """
    problems = _Problems()
    items = _join(table, megatron, problems)
    _check_once(Counter(name for item in items for name in item.hf), problems)
    if of_all_layers:
        _check_gaps(items, problems)
    problems.raise_if_any(what)
    return Plan(_in_order(table, items), {tie.name: tie.to for tie in table.tied})


def _join(table: WeightTable, megatron: Mapping[str, Shape], problems: _Problems) -> list[PlanItem]:
    """Plan items, their Hugging Face shapes derived from the Megatron side."""
    items, used = [], set()
    for name, shape in megatron.items():
        met = table.resolve(name)
        if met is None:
            problems.add(_NO_RULE_MEGATRON, f"{name} {list(shape)}")
            continue
        rule, indices = met
        used.add(rule.tree or rule.megatron)
        hf, hf_shapes = rule.hf_for(indices), tuple(rule.transform.hf_shapes(shape))
        items.append(PlanItem(name, shape, hf, hf_shapes, rule, indices))
    for rule in table.rules:
        if rule.megatron not in used and not rule.optional:
            problems.add(_UNUSED_RULE, f"{rule.megatron} <- {', '.join(rule.hf_names)}")
    return items


def _check_shapes(item: PlanItem, hf: Mapping[str, Shape], problems: _Problems) -> None:
    shapes = [tuple(hf[name]) for name in item.hf]
    gives = item.rule.transform.megatron_shape(shapes, item.shape)
    # The way back must agree too: q, k and v of other sizes can add up to the right number of rows.
    if gives != item.shape or shapes != item.rule.transform.hf_shapes(item.shape):
        pairs = ", ".join(f"{name} {list(shape)}" for name, shape in zip(item.hf, shapes, strict=True))
        wanted = ", ".join(str(list(shape)) for shape in item.hf_shapes)
        problems.add(_SHAPE, f"{pairs} -> {item.megatron} {list(item.shape)}, which needs {wanted}")


def _check_once(used: Counter[str], problems: _Problems) -> None:
    for name, times in used.items():
        if times > 1:
            problems.add(_TWICE, name)


def _check_gaps(items: Iterable[PlanItem], problems: _Problems) -> None:
    """Layers count from 0 without a gap, and so do the experts of each weight of each layer."""
    layers: set[int] = set()
    experts: dict[tuple[str, int | None], set[int]] = defaultdict(set)
    for item in items:
        indices = item.indices
        if "l" in indices:
            layers.add(_hf_layer(item))
        if "e" in indices:
            experts[item.rule.megatron, indices.get("l")].add(indices["e"])
    for layer in _gaps(layers):
        problems.add(_GAP, f"layer {layer}")
    for (rule, layer_held), held in experts.items():
        for expert in _gaps(held):
            problems.add(_GAP, f"expert {expert} of layer {layer_held} ({rule})")


def _gaps(held: set[int]) -> list[int]:
    return sorted(set(range(max(held, default=-1) + 1)) - held)


def _hf_layer(item: PlanItem) -> int:
    """The item's layer as Hugging Face counts, which goes on where Megatron-Core begins anew (prediction layers)."""
    return item.indices.get("l", 0) + NamePattern(item.rule.hf_names[0]).offset("l")


def _in_order(table: WeightTable, items: Iterable[PlanItem]) -> tuple[PlanItem, ...]:
    """Items in the table's order, layer by layer: what stands before the first layered rule, the layers, the rest.

    Within a layer the experts of one weight follow one another.
    """
    position = {rule.megatron: index for index, rule in enumerate(table.rules)}
    first_layered = next((index for index, rule in enumerate(table.rules) if rule.pattern.indices), len(table.rules))

    def key(item: PlanItem) -> tuple[int, int, int, int]:
        place = position[item.rule.tree or item.rule.megatron]
        indices = item.indices
        part = 1 if indices else (0 if place < first_layered else 2)
        return part, _hf_layer(item), place, indices.get("e", 0)

    return tuple(sorted(items, key=key))
