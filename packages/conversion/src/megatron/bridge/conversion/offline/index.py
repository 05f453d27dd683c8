"""The Megatron side of a conversion without a model: canonical names and global shapes, from the table and one side's.

What a model would have refused (a layer too few, other sizes than the configuration's) is refused here.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.names import NamePattern, skeleton
from megatron.bridge.conversion.plan import Plan, PlanError
from megatron.bridge.conversion.table import WeightRule, WeightTable
from megatron.bridge.conversion.transforms import InterleaveGroups, PadRows, Shape

if TYPE_CHECKING:
    from megatron.bridge.conversion.model_bridge import MegatronModelBridge


def megatron_shapes(table: WeightTable, hf: Mapping[str, Shape], vocab_multiple: int) -> dict[str, Shape]:
    """Every Megatron weight that the table makes of these Hugging Face weights, with its global shape.

    Args:
        table: the family's rules.
        hf: the checkpoint's weights with their shapes.
        vocab_multiple: the vocabulary is padded to a multiple of this; Megatron takes
            `make_vocab_size_divisible_by` times the tensor-parallel size.
    """
    by_skeleton = defaultdict(list)
    for name in hf:
        by_skeleton[skeleton(name)].append(name)
    shapes: dict[str, Shape] = {}
    for rule in table.rules:
        for indices in _met(rule, by_skeleton):
            names = rule.hf_for(indices)
            # What is absent is found by the plan; it needs the Megatron name to say for which weight.
            held = [tuple(hf[name]) for name in names if name in hf]
            complete = len(held) == len(names)
            shapes[rule.pattern.format(indices)] = _shape(rule, held, vocab_multiple) if complete else held[0]
    return shapes


def _met(rule: WeightRule, by_skeleton: Mapping[str, Iterable[str]]) -> list[dict[str, int]]:
    """The indices at which some of the rule's Hugging Face weights exist; for a name without indices, always one."""
    found: dict[tuple[tuple[str, int], ...], dict[str, int]] = {}
    for text in rule.hf_names:
        pattern = NamePattern(text)
        for name in by_skeleton.get(pattern.skeleton, ()):
            indices = pattern.match(name)
            if indices is not None:
                found[tuple(sorted(indices.items()))] = indices
    return list(found.values())


def _shape(rule: WeightRule, held: list[Shape], vocab_multiple: int) -> Shape:
    padded = held[0]
    if isinstance(rule.transform, PadRows) and padded:
        padded = (-(-padded[0] // vocab_multiple) * vocab_multiple, *padded[1:])
    try:
        return rule.transform.megatron_shape(held, padded)
    except (IndexError, ValueError, ZeroDivisionError):
        # A shape that the transform cannot take at all; the plan compares the shapes and tells.
        return held[0]


def refuse_other_model(plan: Plan, bridge: "MegatronModelBridge", what: str) -> None:
    """Refuse weights that are not those of the configuration: number of layers, width, vocabulary, heads.

    Raises:
        PlanError: naming every weight kind that disagrees.
    """
    config = bridge.shared_values()
    problems = _layer_problems(plan, config)
    first: dict[str, Any] = {}
    for item in plan:
        first.setdefault(item.rule.megatron, item)
    for item in first.values():
        problems += [f"{item.megatron} {list(item.shape)}: {text}" for text in _size_problems(item, config)]
    if problems:
        raise PlanError(
            f"{what}: the configuration does not describe these weights, so nothing was converted\n  "
            + "\n  ".join(problems)
        )


def _layer_problems(plan: Plan, config: Mapping[str, Any]) -> list[str]:
    wanted = config.get("num_layers")
    if wanted is None:
        return []
    by_rule: dict[str, set[int]] = defaultdict(set)
    for item in plan:
        indices = item.rule.pattern.match(item.megatron) or {}
        if "l" in indices and item.rule.megatron.startswith("decoder.layers."):
            by_rule[item.rule.megatron].add(indices["l"])
    # Not every layer has every weight, but some weight of each must be there.
    layers = set().union(*by_rule.values()) if by_rule else set()
    absent, extra = sorted(set(range(wanted)) - layers), sorted(layers - set(range(wanted)))
    problems = [f"layers without weights: {absent}"] if absent else []
    return problems + ([f"layers beyond the configuration's {wanted}: {extra}"] if extra else [])


def _size_problems(item: Any, config: Mapping[str, Any]) -> list[str]:
    checks: list[tuple[str, str, int]] = []
    name, shape, transform = item.rule.megatron, item.shape, item.rule.transform
    if name == "embedding.word_embeddings.weight":
        checks.append(("hidden_size", "columns", shape[-1]))
    if name == "decoder.layers.{l}.mlp.linear_fc2.weight":
        checks.append(("ffn_hidden_size", "columns", shape[-1]))
    if isinstance(transform, InterleaveGroups) and name.endswith("linear_qkv.weight"):
        checks.append(("num_query_groups", "query groups", shape[0] // transform.group_rows))
    problems = [
        f"{found} {kind}, the configuration's {field} is {config[field]}"
        for field, kind, found in checks
        if config.get(field) is not None and config[field] != found
    ]
    if isinstance(transform, PadRows) and shape[0] < transform.rows:
        problems.append(f"{shape[0]} rows, too few for the configuration's {transform.rows}")
    return problems
