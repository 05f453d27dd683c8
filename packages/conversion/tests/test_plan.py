"""A plan accounts for every weight on both sides, or says which one is left over."""

import pytest
import torch

from megatron.bridge.conversion.entries import join_entries
from megatron.bridge.conversion.names import NamePattern, skeleton
from megatron.bridge.conversion.plan import PlanError, export_plan, import_plan
from megatron.bridge.conversion.shards import COLUMN, GATED_COLUMN, ROW, Expert
from megatron.bridge.conversion.table import Tied, WeightRule, WeightTable
from megatron.bridge.conversion.transforms import Concatenate, InterleaveGroups, PadRows
from megatron.bridge.errors import BridgeError

RULES = (
    WeightRule("embedding.weight", "embed.weight", PadRows(5), COLUMN),
    WeightRule("layers.{l}.qkv", ("h.{l}.q", "h.{l}.k", "h.{l}.v"), InterleaveGroups((2, 1, 1)), COLUMN),
    WeightRule("layers.{l}.fc1", ("h.{l}.gate", "h.{l}.up"), Concatenate(2)),
    WeightRule("norm", "ln_f"),
)
TABLE = WeightTable(RULES, tied=(Tied("head.weight", "embed.weight"),), ignored=("h.{l}.inv_freq",))
HF = {"embed.weight": (5, 3), "ln_f": (3,)} | {
    f"h.{layer}.{name}": (rows, 3)
    for layer in (0, 1)
    for name, rows in {"q": 4, "k": 2, "v": 2, "gate": 6, "up": 6}.items()
}
MEGATRON = {"norm": (3,), "embedding.weight": (8, 3)} | {
    f"layers.{layer}.{name}": (rows, 3) for layer in (1, 0) for name, rows in {"qkv": 8, "fc1": 12}.items()
}


def test_both_sides_correspond_in_hugging_face_order():
    plan = import_plan(TABLE, HF, MEGATRON)
    assert [item.megatron for item in plan] == [
        "embedding.weight",
        "layers.0.qkv",
        "layers.0.fc1",
        "layers.1.qkv",
        "layers.1.fc1",
        "norm",
    ]
    assert plan.items[1].hf == ("h.0.q", "h.0.k", "h.0.v")
    assert plan.hf_shapes == HF


def test_the_export_plan_derives_the_hugging_face_side():
    assert export_plan(TABLE, MEGATRON).hf_shapes == HF


@pytest.mark.parametrize("name", sorted(HF))
def test_any_absent_hugging_face_weight_is_named(name):
    with pytest.raises(PlanError, match="the checkpoint lacks") as caught:
        import_plan(TABLE, {key: shape for key, shape in HF.items() if key != name}, MEGATRON)
    assert name in str(caught.value)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.megatron)
def test_any_deleted_rule_is_noticed_on_both_sides(rule):
    table = WeightTable(tuple(other for other in RULES if other is not rule), TABLE.tied, TABLE.ignored)
    with pytest.raises(PlanError) as caught:
        import_plan(table, HF, MEGATRON)
    indices = {"l": 1}
    assert rule.pattern.format(indices) in str(caught.value)
    for name in rule.hf_for(indices):
        assert name in str(caught.value)
    with pytest.raises(PlanError, match="without a rule"):
        export_plan(table, MEGATRON)


def test_weights_nobody_asked_for_are_refused_unless_named():
    assert import_plan(TABLE, HF | {"h.1.inv_freq": (2,)}, MEGATRON)
    with pytest.raises(PlanError, match=r"h\.1\.surprise \[2\]"):
        import_plan(TABLE, HF | {"h.1.surprise": (2,)}, MEGATRON)


def test_a_rule_that_meets_nothing_is_refused():
    table = WeightTable((*RULES, WeightRule("bias", "b")), TABLE.tied)
    with pytest.raises(PlanError, match="bias <- b"):
        import_plan(table, HF, MEGATRON)


@pytest.mark.parametrize(
    ("name", "shape"), [("h.0.q", (5, 3)), ("h.0.gate", (7, 3)), ("embed.weight", (9, 3)), ("ln_f", (4,))]
)
def test_shapes_that_disagree_are_told_with_both_sizes(name, shape):
    with pytest.raises(PlanError, match="shapes that disagree") as caught:
        import_plan(TABLE, HF | {name: shape}, MEGATRON)
    assert f"{name} {list(shape)}" in str(caught.value)


def test_sizes_that_only_add_up_are_refused():
    # q and k exchanged: the sum of rows is right, each of them is wrong.
    with pytest.raises(PlanError, match=r"which needs \[4, 3\], \[2, 3\], \[2, 3\]"):
        import_plan(TABLE, HF | {"h.0.q": (2, 3), "h.0.k": (4, 3)}, MEGATRON)


def test_a_weight_claimed_twice_is_refused():
    table = WeightTable((*RULES, WeightRule("other", "ln_f")), TABLE.tied)
    with pytest.raises(PlanError, match="claimed by more than one"):
        import_plan(table, HF, MEGATRON | {"other": (3,)})


def test_a_missing_layer_is_noticed_on_the_way_out():
    megatron = {name.replace("layers.1", "layers.2"): shape for name, shape in MEGATRON.items()}
    with pytest.raises(PlanError, match="layer 1"):
        export_plan(TABLE, megatron)


def test_a_tied_weight_in_the_file_is_part_of_the_plan():
    plan = import_plan(TABLE, HF | {"head.weight": (5, 3)}, MEGATRON)
    assert plan.tied == {"head.weight": "embed.weight"}


def test_a_long_list_of_problems_is_cut_with_its_count():
    with pytest.raises(PlanError, match="and 8 more"):
        import_plan(TABLE, HF | {f"extra.{index}": (1,) for index in range(20)}, MEGATRON)


def test_patterns_shift_indices_and_refuse_what_does_not_fit():
    pattern = NamePattern("mtp.{l+2}.x.{e}")
    assert pattern.match("mtp.5.x.0") == {"l": 3, "e": 0}
    assert pattern.match("mtp.1.x.0") is None
    assert pattern.format({"l": 3, "e": 0}) == "mtp.5.x.0"
    assert NamePattern("a.{l}.b.{l}").match("a.1.b.2") is None


def test_a_rule_can_be_for_some_layers_only():
    some = NamePattern("layers.{l=0,12}.x")
    assert [layer for layer in range(20) if some.match(f"layers.{layer}.x")] == [0, 12]
    assert (some.format({"l": 12}), some.skeleton, some.indices) == ("layers.12.x", "layers.#.x", ("l",))
    assert skeleton("a.10.w1.3") == "a.#.w1.#"


def test_a_table_refuses_rules_that_contradict_each_other():
    with pytest.raises(BridgeError, match="two weight rules for 'norm'"):
        WeightTable((*RULES, WeightRule("norm", "other")))
    with pytest.raises(BridgeError, match="same indices"):
        WeightRule("layers.{l}.x", "h.x")


FC1, FC2 = "layers.{l}.experts.{e}.fc1", "layers.{l}.experts.{e}.fc2"


def test_ninety_thousand_weights_plan_in_seconds():
    experts = WeightRule(FC1, ("h.{l}.e.{e}.gate", "h.{l}.e.{e}.up"), Concatenate(2), Expert(GATED_COLUMN))
    index = [(layer, expert) for layer in range(45) for expert in range(1000)]
    hf = {f"h.{layer}.e.{expert}.{kind}": (4, 2) for layer, expert in index for kind in ("gate", "up")}
    megatron = {f"layers.{layer}.experts.{expert}.fc1": (8, 2) for layer, expert in index}
    plan = import_plan(WeightTable((experts,)), hf, megatron)
    assert len(plan) == len(hf) // 2 == 45_000


STACKED = WeightTable(
    (
        WeightRule(FC1, "h.{l}.gate_up[{e}]", shard=Expert(GATED_COLUMN)),
        WeightRule(FC2, "h.{l}.down[{e}]", shard=Expert(ROW)),
    )
)
STACKED_MEGATRON = {
    f"layers.0.experts.{e}.{name}": shape for e in range(3) for name, shape in (("fc1", (8, 2)), ("fc2", (2, 4)))
}
STACKED_HF = {"h.0.gate_up": (3, 8, 2), "h.0.down": (3, 2, 4)}


def test_stacked_experts_are_planned_one_by_one_and_written_whole():
    for plan in (import_plan(STACKED, STACKED_HF, STACKED_MEGATRON), export_plan(STACKED, STACKED_MEGATRON)):
        assert plan.hf_shapes == STACKED_HF
        assert [item.hf for item in plan][:4] == [(f"h.0.gate_up[{e}]",) for e in range(3)] + [("h.0.down[0]",)]


@pytest.mark.parametrize(
    ("hf", "named"),
    [
        ({"h.0.gate_up": (4, 8, 2)}, r"without a rule.*\n.*h\.0\.gate_up\[3\]"),
        ({"h.0.gate_up": (2, 8, 2)}, r"lacks.*\n.*h\.0\.gate_up\[2\]"),
        ({"h.0.down": (3, 4, 2)}, r"h\.0\.down\[0\] \[4, 2\]"),
    ],
)
def test_a_stack_with_other_experts_or_shapes_is_refused(hf, named):
    with pytest.raises(PlanError, match=named):
        import_plan(STACKED, STACKED_HF | hf, STACKED_MEGATRON)


def test_a_missing_expert_is_noticed_on_the_way_out():
    megatron = {name: shape for name, shape in STACKED_MEGATRON.items() if ".1.fc2" not in name}
    with pytest.raises(PlanError, match=r"expert 1 of layer 0 \(layers\.\{l\}\.experts\.\{e\}\.fc2\)"):
        export_plan(STACKED, megatron)


def test_entries_are_joined_in_any_order_and_the_rest_passes():
    stack = torch.arange(12).view(3, 4)
    weights = [("a[2]", stack[2]), ("b", stack), ("a[0]", stack[0]), ("a[1]", stack[1])]
    joined = list(join_entries(weights, {"a": (3, 4)}))
    assert [name for name, _ in joined] == ["b", "a"]
    assert torch.equal(joined[1][1], stack)


def test_only_experts_have_the_shard_rule_of_experts():
    for name, rule in ((FC1, GATED_COLUMN), ("layers.{l}.x", Expert(ROW))):
        with pytest.raises(BridgeError, match="a weight per expert {e} needs the shard rule Expert"):
            WeightRule(name, name, shard=rule)
