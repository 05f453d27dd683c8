"""Rules for whole sub-trees, tables of models inside models, and names that versions of transformers spell apart."""

import pytest

from megatron.bridge.conversion.plan import PlanError, export_plan, import_plan
from megatron.bridge.conversion.shards import COLUMN
from megatron.bridge.conversion.table import Tied, WeightRule, WeightTable
from megatron.bridge.conversion.transforms import Concatenate
from megatron.bridge.errors import BridgeError

LANGUAGE = WeightTable.of(
    WeightRule("decoder.layers.{l}.w", ("model.layers.{l}.a", "model.layers.{l}.b"), Concatenate(2), COLUMN),
    WeightRule("embedding.w", "model.embed"),
    tied=[Tied("lm_head.w", "model.embed")],
    ignored=["model.layers.{l}.freq"],
)
PARTS = LANGUAGE.under("language.", {"model.": "inner.model.", "lm_head.": "inner.lm_head."})
TABLE = WeightTable.of(
    WeightRule("vision.tower.**", "tower.**"),
    WeightRule("vision.newline", "newline"),
    PARTS.rules,
    tied=PARTS.tied,
    ignored=PARTS.ignored,
    spellings=[("tower.", "tower.old."), ("inner.model.", "model.inner.")],
)
HF = {
    "tower.blocks.0.w": (3, 2),
    "tower.norm": (3,),
    "newline": (4,),
    "inner.model.layers.0.a": (2, 4),
    "inner.model.layers.0.b": (2, 4),
    "inner.model.embed": (8, 4),
}
MEGATRON = {
    "vision.tower.blocks.0.w": (3, 2),
    "vision.tower.norm": (3,),
    "vision.newline": (4,),
    "language.decoder.layers.0.w": (4, 4),
    "language.embedding.w": (8, 4),
}


def without(shapes, name):
    return {other: shape for other, shape in shapes.items() if other != name}


def test_a_sub_tree_joins_weight_by_weight():
    plan = import_plan(TABLE, {**HF, "inner.lm_head.w": (8, 4), "inner.model.layers.0.freq": (2,)}, MEGATRON)
    assert {item.megatron: item.hf for item in plan} == {
        "vision.tower.blocks.0.w": ("tower.blocks.0.w",),
        "vision.tower.norm": ("tower.norm",),
        "vision.newline": ("newline",),
        "language.decoder.layers.0.w": ("inner.model.layers.0.a", "inner.model.layers.0.b"),
        "language.embedding.w": ("inner.model.embed",),
    }
    assert plan.tied == {"inner.lm_head.w": "inner.model.embed"}
    assert export_plan(TABLE, MEGATRON).hf_shapes == HF


@pytest.mark.parametrize(
    ("hf", "megatron", "culprit"),
    [
        ({**HF, "tower.more": (1,)}, MEGATRON, r"tower\.more \[1\]"),
        (without(HF, "tower.norm"), MEGATRON, r"tower\.norm \(for vision\.tower\.norm\)"),
        (HF, without(MEGATRON, "vision.tower.norm"), r"without a rule.*\n +tower\.norm"),
        ({**HF, "tower.norm": (2,)}, MEGATRON, r"tower\.norm \[2\] -> vision\.tower\.norm \[3\]"),
        (HF, {**MEGATRON, "vision.towers.w": (1,)}, r"vision\.towers\.w \[1\]"),
        (
            {name: shape for name, shape in HF.items() if "tower" not in name},
            {name: shape for name, shape in MEGATRON.items() if "tower" not in name},
            r"rules that meet no Megatron weight.*\n +vision\.tower\.\*\* <- tower\.\*\*",
        ),
    ],
)
def test_a_sub_tree_is_proven_weight_by_weight(hf, megatron, culprit):
    with pytest.raises(PlanError, match=culprit):
        import_plan(TABLE, hf, megatron)


def test_a_rule_of_one_weight_comes_before_a_sub_tree():
    own = WeightRule("vision.tower.norm", ("tower.norm_a", "tower.norm_b"), Concatenate(2))
    met = WeightTable.of(WeightRule("vision.tower.**", "tower.**"), own).resolve("vision.tower.norm")
    assert met is not None
    assert met[0] is own


@pytest.mark.parametrize(
    "rule",
    [
        ("tower.**", "tower"),
        ("tower", "tower.**"),
        ("tower.**", "tower.**", Concatenate(1)),
        ("tower.**", ("a.**", "b")),
    ],
)
def test_a_sub_tree_on_one_side_or_changed_is_refused(rule):
    with pytest.raises(BridgeError, match=r"a sub-tree \(\.\*\*\) has one on either side"):
        WeightRule(*rule)


def test_a_table_grows_the_rules_of_the_weights_there_are():
    grown = TABLE.grown(HF)
    assert [rule.megatron for rule in grown.rules][:2] == ["vision.tower.blocks.0.w", "vision.tower.norm"]
    assert len(grown.rules) == len(TABLE.rules) + 1


def test_names_follow_the_spelling_that_is_met():
    assert TABLE.spelled(HF) is TABLE
    older = {name.replace("tower.", "tower.old.").replace("inner.model", "model.inner"): HF[name] for name in HF}
    spelled = TABLE.spelled(older)
    assert export_plan(spelled, MEGATRON).hf_shapes == older
    assert spelled.tied == (Tied("inner.lm_head.w", "model.inner.embed"),)
