"""The family test kit: a family against transformers at several parallel layouts, in three lines.

from megatron.bridge.testing import check_family

def test_my_family():
    check_family(MyConfig(hidden_size=64, ...))
"""

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.platform.launch import run_ranks
from megatron.bridge.testing.hf_models import random_model, save_random_model
from megatron.bridge.testing.layouts import EVERYWHERE, EXPERTS_EVERYWHERE, LAYOUTS, layout_fields, ranks_of

__all__ = [
    "EVERYWHERE",
    "EXPERTS_EVERYWHERE",
    "LAYOUTS",
    "FamilyCase",
    "FamilyMismatch",
    "check_family",
    "compare",
    "expect_same_keys",
    "expect_same_weights",
    "family_case",
    "refuse_without_any_rule",
]

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


class FamilyMismatch(AssertionError):
    """A family does not compute or convert what transformers does; the message names it, the layout and the weight."""


@dataclass(frozen=True)
class FamilyCase:
    """A tiny random model of a family.

    Args:
        name: of the case, for messages.
        folder: its Hugging Face folder.
        weights: what the folder's files hold.
        tokens: token ids [batch, sequence].
        logits: transformers' logits of `tokens`, [batch, sequence, vocabulary].
        inputs: per row, what the model takes besides tokens.
    """

    name: str
    folder: Path
    weights: "Mapping[str, torch.Tensor]"
    tokens: "torch.Tensor"
    logits: "torch.Tensor"
    inputs: "Sequence[Mapping[str, torch.Tensor]]" = ()


def family_case(config: "PretrainedConfig", folder: Path, name: str | None = None, length: int = 24) -> FamilyCase:
    """Save a random model of `config` to `folder`, with transformers' answer to two random rows.

    The rows hold images besides tokens where the model sees them.

    Args:
        config: of a model that is small enough for a test, in float32.
        folder: where to save it.
        name: for messages; None takes the configuration's class.
        length: tokens per row of text.
    """
    from megatron.bridge.conversion.auto_bridge import AutoBridge
    from megatron.bridge.conversion.probes import probe
    from megatron.bridge.conversion.reference import logits_of

    weights = save_random_model(config, folder)
    reference = random_model(config)
    given = probe(AutoBridge.from_hf_pretrained(folder).model_bridge, reference, length, seed=3)
    logits = logits_of(reference, given.tokens, given.inputs)
    return FamilyCase(name or type(config).__name__, folder, weights, given.tokens, logits, given.inputs)


def check_family(
    config: "PretrainedConfig",
    *,
    layouts: Iterable[str] | None = None,
    layer_spec: str | None = "torch",
    tolerance: float = 1e-5,
) -> dict[str, float]:
    """Prove a family on a tiny random model of `config`.

    At every layout: transformers' logits, and the very weights that were read on the way out. On one rank besides: the
    table's names and shapes are those of Megatron-Core's `sharded_state_dict()`, and without any one of its rules
    nothing is converted, and the error names the weights.

    Args:
        config: of a model that is small enough for a test, in float32.
        layouts: names in `LAYOUTS` and `EXPERT_LAYOUTS`; None takes one rank, two tensor-parallel and two
            pipeline-parallel ones, and for a mixture of experts two expert- and two expert-tensor-parallel ones.
        layer_spec: layer spec to build with; None takes the machine's default.
        tolerance: largest difference of a logit, relative to the largest logit.

    Returns:
        The largest relative difference of the logits by layout.

    Raises:
        FamilyMismatch: what differs, and where.
        BridgeError: the family is not offered, or refuses the configuration.
    """
    with tempfile.TemporaryDirectory() as folder, _one_thread():
        case = family_case(config, Path(folder))
        names = layouts or (EXPERTS_EVERYWHERE if _has_experts(case) else EVERYWHERE)
        found = {layout: compare([case], layout, layer_spec, tolerance)[case.name] for layout in names}
        run_ranks(1, expect_same_keys, case, timeout=120)
        run_ranks(1, refuse_without_any_rule, case, timeout=120)
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch on one thread: ranks are forked from this process, and a pool of threads does not survive that."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _has_experts(case: FamilyCase) -> bool:
    from megatron.bridge.conversion.auto_bridge import AutoBridge

    provider = AutoBridge.from_hf_pretrained(case.folder).to_megatron_provider()
    return bool(getattr(provider, "num_moe_experts", None))


def compare(
    cases: Sequence[FamilyCase], layout: str, layer_spec: str | None = "torch", tolerance: float = 1e-5
) -> dict[str, float]:
    """Compare several families at one layout, all in the same ranks.

    Returns:
        The largest relative difference of the logits by case.

    Raises:
        FamilyMismatch: some case's logits differ by more than `tolerance`, or a weight comes back changed.
    """
    fields = layout_fields(layout)
    found: dict[str, float] = run_ranks(ranks_of(fields), _compare_in_rank, cases, fields, layer_spec, timeout=600)[0]
    above = {name: difference for name, difference in found.items() if not difference < tolerance}
    if above:
        raise FamilyMismatch(f"{layout}, layer spec {layer_spec}: logits differ from transformers' by {above}")
    return found


def _compare_in_rank(
    cases: Sequence[FamilyCase], layout: Mapping[str, Any], layer_spec: str | None
) -> dict[str, float]:
    from megatron.bridge.conversion.auto_bridge import AutoBridge
    from megatron.bridge.conversion.logits import megatron_logits
    from megatron.bridge.conversion.verify import relative_difference

    found = {}
    for case in cases:
        bridge = AutoBridge.from_hf_pretrained(case.folder)
        model = bridge.to_megatron_model(**layout, layer_spec=layer_spec)
        logits = megatron_logits(model, case.tokens, case.inputs)[..., : case.logits.shape[-1]]
        found[case.name] = relative_difference(logits, case.logits)
        expect_same_weights(case, bridge.export_hf_weights(model))
    return found


def expect_same_weights(case: FamilyCase, exported: "Iterator[tuple[str, torch.Tensor]]") -> None:
    """Compare an export with the folder's own weights, bit for bit.

    Raises:
        FamilyMismatch: names that are missing, unexpected or changed.
    """
    import torch

    held = dict(exported)
    changed = [name for name in held.keys() & case.weights.keys() if not torch.equal(held[name], case.weights[name])]
    faults = {
        "missing": sorted(case.weights.keys() - held.keys()),
        "unexpected": sorted(held.keys() - case.weights.keys()),
        "changed": sorted(changed),
    }
    if any(faults.values()):
        told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise FamilyMismatch(f"{case.name}: the exported weights are not those that were read ({told})")


def expect_same_keys(case: FamilyCase) -> None:
    """Compare the family's table with Megatron-Core's `sharded_state_dict()`. To be run in one rank.

    Raises:
        FamilyMismatch: a key or a shape that only one of the two has.
    """
    from megatron.bridge.conversion.auto_bridge import AutoBridge
    from megatron.bridge.testing.key_table import differences

    bridge = AutoBridge.from_hf_pretrained(case.folder)
    model = bridge.to_megatron_model(load_weights=False)
    if found := differences(bridge.get_conversion_tasks(model).plan, model):
        raise FamilyMismatch(f"{case.name}: the table and Megatron-Core's checkpoints differ: {'; '.join(found)}")


def refuse_without_any_rule(case: FamilyCase) -> int:
    """Leave out each rule of the family's table in turn: nothing may be converted. To be run in one rank.

    Returns:
        How many rules there are.

    Raises:
        FamilyMismatch: an import went through, touched the model, or did not name the weights of the missing rule.
    """
    import torch

    from megatron.bridge.conversion.auto_bridge import AutoBridge
    from megatron.bridge.conversion.entries import base_name
    from megatron.bridge.conversion.plan import PlanError
    from megatron.bridge.conversion.table import TREE

    bridge = AutoBridge.from_hf_pretrained(case.folder)
    model = bridge.to_megatron_model(load_weights=False)
    before = [parameter.clone() for parameter in model[0].parameters()]
    table = bridge.model_bridge.mapping_registry()
    first = {
        item.rule.tree or item.rule.megatron: item for item in reversed(bridge.get_conversion_tasks(model).plan.items)
    }
    for rule in (rule for rule in table.rules if rule.megatron in first):
        rest = dataclasses.replace(table, rules=tuple(other for other in table.rules if other is not rule))
        bridge.model_bridge.mapping_registry = lambda rest=rest: rest  # type: ignore[method-assign, misc]
        try:
            bridge.load_hf_weights(model)
        except PlanError as error:
            message = str(error)
        else:
            raise FamilyMismatch(f"{case.name}: the import went through without the rule for {rule.megatron}")
        item = first[rule.megatron]
        names = (rule.megatron, *rule.hf_names) if rule.is_tree else (item.megatron, *map(base_name, item.hf))
        unnamed = [name for name in names if name.removesuffix(TREE) not in message]
        if unnamed:
            raise FamilyMismatch(f"{case.name}: without its rule, {', '.join(unnamed)} is not named in: {message}")
    if not all(torch.equal(old, new) for old, new in zip(before, model[0].parameters(), strict=True)):
        raise FamilyMismatch(f"{case.name}: a refused import has changed the model")
    return len(first)
