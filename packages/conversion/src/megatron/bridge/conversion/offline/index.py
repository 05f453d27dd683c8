"""The Megatron side of a conversion without a model: canonical names and global shapes, from the table and one side's.

What a model would have refused (a layer too few, other sizes than the configuration's) is refused here.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.names import skeleton
from megatron.bridge.conversion.plan import Plan, PlanError, PlanItem
from megatron.bridge.conversion.table import WeightRule, WeightTable
from megatron.bridge.conversion.transforms import Concatenate, InterleaveGroups, PadRows, Repeated, Shape, Transform

if TYPE_CHECKING:
    from megatron.bridge.conversion.model_bridge import MegatronModelBridge

# The indices at which a rule is met.
type _Places = list[dict[str, int]]

_DECODER = "decoder.layers."
_ENCODER = "encoder.layers."
# Before the linear layer, or behind it.
_FUSED_NORM = re.compile(r"(.*\.linear_\w+)\.(?:layer_norm_|post_layernorm\.)(?:weight|bias)")


@contextmanager
def configuration_faults(what: str) -> Iterator[None]:
    """Tell as a refusal what a family's code stumbles over when a configuration holds values of another kind.

    Raises:
        PlanError: in place of the error of the arithmetic or of the look-up.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise PlanError(
            f"{what}: the values of config.json do not describe a model ({type(error).__name__}: {error}); correct it"
        ) from error


def megatron_shapes(table: WeightTable, hf: Mapping[str, Shape], vocab_multiple: int, what: str) -> dict[str, Shape]:
    """Every Megatron weight that the table makes of these Hugging Face weights, with its global shape.

    Args:
        table: the family's rules.
        hf: the checkpoint's weights with their shapes.
        vocab_multiple: the vocabulary is padded to a multiple of this; Megatron takes
            `make_vocab_size_divisible_by` times the tensor-parallel size.
        what: named in errors.

    Raises:
        PlanError: shapes that no Megatron weight can be made of; all of them are listed.
    """
    hf = table.entries(hf)
    by_skeleton = defaultdict(list)
    for name in hf:
        by_skeleton[skeleton(name)].append(name)
    shapes: dict[str, Shape] = {}
    faults: list[str] = []
    met = _of_latest_layers({rule: _met(rule, by_skeleton) for rule in table.rules})
    for rule, places in _of_their_layers(table, met).items():
        for indices in places:
            names, megatron = rule.hf_for(indices), rule.pattern.format(indices)
            held = [tuple(hf[name]) for name in names if name in hf]
            # What is absent the plan will tell, with what is there instead; it needs a shape until then.
            held += held[:1] * (len(names) - len(held))
            try:
                shapes[megatron] = _shape(rule, held, vocab_multiple)
            except (IndexError, ValueError, ZeroDivisionError):
                pairs = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, held, strict=True))
                faults.append(f"{pairs}: no {megatron} can be made of these shapes")
    if faults:
        raise PlanError(f"{what}: nothing was converted, because of\n  " + "\n  ".join(faults))
    return shapes


def _met(rule: WeightRule, by_skeleton: Mapping[str, Iterable[str]]) -> _Places:
    """The indices at which some of the rule's Hugging Face weights exist; for a name without indices, always one."""
    found: dict[tuple[int, ...], dict[str, int]] = {}
    for pattern in rule.hf_patterns:
        for name in by_skeleton.get(pattern.skeleton, ()):
            indices = pattern.match(name)
            if indices is not None:
                found[tuple(indices[variable] for variable in rule.pattern.indices)] = indices
    return list(found.values())


def _of_latest_layers(met: Mapping[WeightRule, _Places]) -> Mapping[WeightRule, _Places]:
    """The same, without the decoder's rules at layers that belong to rules which begin to count behind it."""
    first = {rule: rule.hf_patterns[0].offset("l") for rule in met}
    if not any(first.values()):
        return met
    begins: dict[str, int] = {}
    for rule, places in met.items():
        for name in (name for indices in places for name in rule.hf_for(indices)):
            begins[name] = max(begins.get(name, 0), first[rule])
    return {
        rule: [indices for indices in places if all(begins[name] == first[rule] for name in rule.hf_for(indices))]
        if rule.hf_patterns[0].indices
        else places
        for rule, places in met.items()
    }


def _of_their_layers(table: WeightTable, met: Mapping[WeightRule, _Places]) -> dict[WeightRule, _Places]:
    """The same, without the rules that only seem to be met.

    Where layers are of several kinds, a norm may bear one Hugging Face name in all of them and belong to another
    Megatron module in each. One that Megatron fuses with a linear layer is met where that layer is; any other one where
    no fused norm is.
    """
    by_names = defaultdict(list)
    for rule in table.rules:
        by_names[rule.hf_names].append(rule)
    of_name = {rule.megatron: rule for rule in table.rules}
    kept = dict(met)
    for rivals in by_names.values():
        linear = {rule: _FUSED_NORM.sub(r"\1.weight", rule.megatron) for rule in rivals}
        fused = {rule: of_name[name] for rule, name in linear.items() if name != rule.megatron and name in of_name}
        if len(rivals) == 1 or not fused:
            continue
        taken: list[dict[str, int]] = []
        for rule, owner in fused.items():
            kept[rule] = [indices for indices in met[rule] if indices in met[owner]]
            taken += kept[rule]
        for rule in rivals:
            if rule not in fused:
                kept[rule] = [indices for indices in met[rule] if indices not in taken]
    return kept


def _shape(rule: WeightRule, held: list[Shape], vocab_multiple: int) -> Shape:
    padded = held[0]
    if isinstance(_once(rule.transform), PadRows):
        padded = (-(-padded[0] // vocab_multiple) * vocab_multiple, *padded[1:])
    shape = rule.transform.megatron_shape(held, padded)
    # Raises when the way back does not exist.
    rule.transform.hf_shapes(shape)
    return shape


def _once(transform: Transform) -> Transform:
    """How a weight that files may repeat is held once."""
    return transform.inner if isinstance(transform, Repeated) else transform


def refuse_other_model(plan: Plan, bridge: "MegatronModelBridge", what: str) -> None:
    """Refuse weights that are not those of the configuration: number of layers, width, vocabulary, heads.

    Raises:
        PlanError: naming every weight kind that disagrees.
    """
    config = bridge.shared_values()
    problems = _tree_problems(plan, bridge.tree_shapes())
    plan = _of_the_language_model(plan, bridge.language_prefix)
    problems += _layer_problems(plan, config) + _expert_problems(plan, bridge.moe_layers(), config)
    first: dict[str, PlanItem] = {}
    for item in plan:
        alike = first.setdefault(item.rule.megatron, item)
        # One wrong size would otherwise be told once per layer.
        if item is alike:
            texts = _size_problems(item, config)
        else:
            texts = [f"{alike.megatron} is {list(alike.shape)}"] if item.shape != alike.shape else []
        problems += [f"{item.megatron} {list(item.shape)} ({', '.join(item.hf)}): {text}" for text in texts]
    if problems:
        raise PlanError(
            f"{what}: the configuration does not describe these weights, so nothing was converted\n  "
            + "\n  ".join(problems)
        )


def _tree_problems(plan: Plan, wanted: Mapping[str, Shape]) -> list[str]:
    """Weights of whole sub-trees that are missing, too many or of another size."""
    held = {item.megatron: item for item in plan if item.rule.tree is not None}
    problems = [f"{name} {list(shape)} is missing" for name, shape in wanted.items() if name not in held]
    for name, item in held.items():
        if wanted.get(name) != item.shape:
            says = f"is {list(wanted[name])}" if name in wanted else "has no such weight"
            problems.append(f"{name} {list(item.shape)} ({', '.join(item.hf)}): the configuration's {says}")
    return problems


def _of_the_language_model(plan: Plan, prefix: str) -> Plan:
    """The plan's language model, by the names that it has by itself."""
    items = [
        replace(
            item,
            megatron=item.megatron.removeprefix(prefix),
            rule=replace(item.rule, megatron=item.rule.megatron.removeprefix(prefix)),
        )
        for item in plan
        if item.megatron.startswith(prefix)
    ]
    return replace(plan, items=tuple(items)) if prefix else plan


def _layer_problems(plan: Plan, config: Mapping[str, Any]) -> list[str]:
    """Layers that are missing or too many, and weights that only some layers have."""
    stacks = {_DECODER: ("layers", "num_layers"), _ENCODER: ("encoder layers", "encoder_num_layers")}
    return [
        problem
        for stack, (named, field) in stacks.items()
        for problem in _stack_problems(plan, stack, named, config.get(field))
    ]


def _stack_problems(plan: Plan, stack: str, named: str, depth: int | None) -> list[str]:
    rules: dict[str, WeightRule] = {}
    layers_of: dict[str, set[int]] = defaultdict(set)
    for item in plan:
        if "l" in item.indices and item.rule.megatron.startswith(stack):
            rules[item.rule.megatron] = item.rule
            layers_of[item.rule.megatron].add(item.indices["l"])
    held = set().union(*layers_of.values())
    wanted = set(range(len(held) if depth is None else depth))
    problems = []
    if absent := sorted(wanted - held):
        problems.append(f"{named} without weights: {absent}")
    if extra := sorted(held - wanted):
        problems.append(f"{named} beyond the configuration's {len(wanted)}: {extra}")
    for name, layers in layers_of.items():
        # Where layers are of several kinds, each layer that lacks this weight has another kind's in its place.
        others = set().union(*(other for other in layers_of.values() if not other & layers))
        if gap := sorted(wanted - layers - others - set(absent)):
            names = ", ".join(hf for layer in gap[:3] for hf in rules[name].hf_for({"l": layer, "e": 0}))
            problems.append(f"{named} {gap} lack {name}, made of {names}")
    return problems


def _expert_problems(plan: Plan, mixtures: Sequence[bool] | None, config: Mapping[str, Any]) -> list[str]:
    """Mixtures of experts in other layers than the configuration's, and experts that are missing or too many."""
    experts: dict[tuple[str, int], set[int]] = defaultdict(set)
    for item in plan:
        if "e" in item.indices and item.rule.megatron.startswith(_DECODER):
            experts[item.rule.megatron, item.indices["l"]].add(item.indices["e"])
    problems = []
    if mixtures is not None:
        held, stated = {layer for _, layer in experts}, {layer for layer, mixture in enumerate(mixtures) if mixture}
        if held != stated:
            problems.append(f"layers {sorted(held)} hold experts, the configuration says {sorted(stated)}")
    for (name, layer), numbers in experts.items():
        wanted = set(range(config.get("num_moe_experts") or len(numbers)))
        if absent := sorted(wanted - numbers):
            problems.append(f"layer {layer} lacks experts {_shortened(absent)} of {name}")
        if extra := sorted(numbers - wanted):
            problems.append(
                f"layer {layer} has experts {_shortened(extra)} of {name} beyond the configuration's {len(wanted)}"
            )
    return problems


def _shortened(numbers: list[int], shown: int = 8) -> str:
    more = f" and {len(numbers) - shown} more" if len(numbers) > shown else ""
    return f"{', '.join(map(str, numbers[:shown]))}{more}"


# The size of each axis of a weight, as a provider field; None where the configuration does not say it directly.
_AXES: Mapping[str, tuple[str | None, ...]] = {
    "embedding.word_embeddings.weight": (None, "hidden_size"),
    "output_layer.weight": (None, "hidden_size"),
    "decoder.final_layernorm.weight": ("hidden_size",),
    "decoder.final_layernorm.bias": ("hidden_size",),
    "decoder.layers.{l}.self_attention.linear_qkv.layer_norm_weight": ("hidden_size",),
    "decoder.layers.{l}.self_attention.linear_qkv.layer_norm_bias": ("hidden_size",),
    "decoder.layers.{l}.self_attention.linear_qkv.weight": (None, "hidden_size"),
    "decoder.layers.{l}.self_attention.linear_qkv.bias": (None,),
    "decoder.layers.{l}.self_attention.linear_q_proj.weight": (None, "hidden_size"),
    "decoder.layers.{l}.self_attention.linear_q_down_proj.weight": ("q_lora_rank", "hidden_size"),
    "decoder.layers.{l}.self_attention.linear_q_up_proj.weight": (None, "q_lora_rank"),
    "decoder.layers.{l}.self_attention.linear_kv_down_proj.weight": (None, "hidden_size"),
    "decoder.layers.{l}.self_attention.linear_kv_up_proj.weight": (None, "kv_lora_rank"),
    "decoder.layers.{l}.self_attention.linear_proj.weight": ("hidden_size", None),
    "decoder.layers.{l}.self_attention.linear_proj.bias": ("hidden_size",),
    "decoder.layers.{l}.mlp.linear_fc1.layer_norm_weight": ("hidden_size",),
    "decoder.layers.{l}.mlp.linear_fc1.layer_norm_bias": ("hidden_size",),
    "decoder.layers.{l}.mlp.linear_fc1.weight": (None, "hidden_size"),
    "decoder.layers.{l}.mlp.linear_fc1.bias": (None,),
    "decoder.layers.{l}.mlp.linear_fc2.weight": ("hidden_size", "ffn_hidden_size"),
    "decoder.layers.{l}.mlp.linear_fc2.bias": ("hidden_size",),
    "decoder.layers.{l}.mlp.router.weight": ("num_moe_experts", "hidden_size"),
    "decoder.layers.{l}.mlp.experts.experts.{e}.linear_fc2.weight": (None, "moe_ffn_hidden_size"),
}
# The size of each part of a gated projection, as a provider field.
_GATED: Mapping[str, str] = {
    "decoder.layers.{l}.mlp.linear_fc1.": "ffn_hidden_size",
    "decoder.layers.{l}.mlp.experts.experts.{e}.linear_fc1.": "moe_ffn_hidden_size",
}


def _size_problems(item: PlanItem, config: Mapping[str, Any]) -> list[str]:
    name, shape, transform = item.rule.megatron, item.shape, item.rule.transform
    axes = _AXES.get(name)
    if axes is not None and len(axes) != len(shape):
        return [f"its shape should have {len(axes)} axes"]
    problems = [
        f"axis {axis} has {size}, the configuration's {field} is {config[field]}"
        for axis, (size, field) in enumerate(zip(shape, axes or (), strict=False))
        if field is not None and config.get(field) not in (None, size)
    ]
    if transform.megatron_shape(item.hf_shapes, shape) != shape:
        problems.append(f"its shape cannot be taken apart by {transform}")
    if isinstance(transform, InterleaveGroups) and (groups := config.get("num_query_groups")) is not None:
        wanted = groups * transform.group_rows
        if ".linear_qkv." in name and shape[0] != wanted:
            problems.append(f"axis 0 has {shape[0]}, the configuration's {groups} query groups need {wanted}")
    problems += _gated_problems(item, config)
    padded = _once(transform)
    if isinstance(padded, PadRows) and shape[0] < padded.rows:
        problems.append(f"{shape[0]} rows, too few for the configuration's {padded.rows}")
    return problems


def _gated_problems(item: PlanItem, config: Mapping[str, Any]) -> list[str]:
    """A gated MLP's two halves against the configuration's size."""
    transform = item.rule.transform
    field = next((field for start, field in _GATED.items() if item.rule.megatron.startswith(start)), None)
    wanted = None if field is None else config.get(field)
    if wanted is None or not isinstance(transform, Concatenate):
        return []
    found = item.shape[0] // transform.count
    return [] if found == wanted else [f"its parts have {found} rows, the configuration's {field} is {wanted}"]
