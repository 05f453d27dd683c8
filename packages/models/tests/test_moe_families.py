"""Mixtures of experts at every layout: transformers' logits, bitwise round trips, and nothing left over."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Dots1Config,
    ExaoneMoeConfig,
    Glm4MoeConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SolarOpenConfig,
)

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.live_weights import global_expert
from megatron.bridge.conversion.plan import PlanError
from megatron.bridge.conversion.table import WeightTable
from megatron.bridge.errors import BridgeError
from megatron.bridge.models import moe_fragments
from megatron.bridge.models.routing import sigmoid_routing, softmax_routing
from megatron.bridge.testing import RankFailed, random_model, run_ranks, save_random_model
from megatron.bridge.testing.families import compare, expect_same_weights, family_case
from megatron.bridge.testing.layouts import EP, ETP, TP, layout_fields, ranks_of

LAYOUTS = ("single", "tp2", "pp2", "vpp2", "ep2", "ep4", "tp2ep2", "tp2ep2etp1", "etp2", "pp2ep2")

SIZES = {
    "vocab_size": 131,  # prime: no tensor-parallel size divides it
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "dtype": "float32",
}
QWEN = {**SIZES, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
DOTS = {
    **SIZES,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
EXAONE = {**QWEN, "num_shared_experts": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2),
    "mixtral-window": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=3, sliding_window=5),
    "qwen2-moe": Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=48),
    "qwen2-moe-mixed": Qwen2MoeConfig(
        **QWEN, shared_expert_intermediate_size=48, norm_topk_prob=True, decoder_sparse_step=2, tie_word_embeddings=True
    ),
    "qwen3-moe": Qwen3MoeConfig(**QWEN, head_dim=32, norm_topk_prob=True),
    "qwen3-moe-mixed": Qwen3MoeConfig(**QWEN, head_dim=16, mlp_only_layers=[0, 3], attention_bias=True),
    "dots1": Dots1Config(**DOTS),
    "dots1-groups": Dots1Config(**DOTS, n_group=4, topk_group=2, attention_bias=True),
    "glm4-moe": Glm4MoeConfig(**DOTS, attention_bias=True, num_nextn_predict_layers=0),
    "glm4-moe-qk-norm": Glm4MoeConfig(**DOTS, use_qk_norm=True, head_dim=32),
    "solar-open": SolarOpenConfig(**DOTS, head_dim=32),
    "exaone-moe": ExaoneMoeConfig(**EXAONE, sliding_window=5, sliding_window_pattern=2),
    "exaone-moe-full": ExaoneMoeConfig(**EXAONE, sliding_window=5, layer_types=["full_attention"] * 4),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("moe-families")
    return {name: family_case(config, root / name, name) for name, config in CONFIGS.items()}


@pytest.mark.parametrize(("layout", "spec"), [*((layout, "torch") for layout in LAYOUTS), ("tp2ep2", "local")])
def test_logits_and_round_trip(cases, layout, spec):
    assert compare(list(cases.values()), layout, spec).keys() == CONFIGS.keys()


def save(cases, root, fields):
    for name, case in cases.items():
        bridge = AutoBridge.from_hf_pretrained(case.folder)
        bridge.save_megatron_model(bridge.to_megatron_model(**fields), root / name)


def reload(cases, root, fields):
    for name, case in cases.items():
        bridge = AutoBridge.from_megatron_checkpoint(root / name)
        expect_same_weights(case, bridge.export_hf_weights(bridge.load_megatron_model(root / name, **fields)))


@pytest.mark.parametrize(("written", "read"), [("ep2", "pp2"), ("tp2", "ep2"), ("pp2ep2", "tp2ep2")])
def test_a_checkpoint_written_at_one_layout_exports_at_another(cases, tmp_path, written, read):
    for layout, work in ((written, save), (read, reload)):
        fields = layout_fields(layout)
        run_ranks(ranks_of(fields), work, cases, tmp_path, fields)


def delete_each_rule(folder, layout):
    """In one rank: the error of a load without each rule, by the rule's Megatron name."""
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = bridge.to_megatron_model(load_weights=False, **layout)
    before = [parameter.clone() for parameter in model[0].parameters()]
    table, messages = bridge.model_bridge.mapping_registry(), {}
    for rule in table.rules:
        rest = WeightTable(tuple(other for other in table.rules if other is not rule), table.tied, table.ignored)
        bridge.model_bridge.mapping_registry = lambda rest=rest: rest
        with pytest.raises(PlanError) as caught:
            bridge.load_hf_weights(model)
        messages[rule.megatron] = str(caught.value)
    assert all(torch.equal(old, new) for old, new in zip(before, model[0].parameters(), strict=True))
    return messages


@pytest.mark.parametrize("layout", ["single", "ep2"])
@pytest.mark.parametrize("name", ["dots1", "mixtral"])
def test_without_any_one_rule_nothing_is_converted_and_the_weights_are_named(cases, name, layout):
    fields, folder = layout_fields(layout), cases[name].folder
    bridge = AutoBridge.from_hf_pretrained(folder)
    # Messages are cut after a dozen names, the first layer's experts among them.
    layer = list(bridge.model_bridge.moe_layers()).index(True)
    for messages in run_ranks(ranks_of(fields), delete_each_rule, folder, fields):
        for rule in bridge.model_bridge.mapping_registry().rules:
            dense = ".mlp.linear_fc" in rule.megatron
            indices = {"l": 0 if dense or "self_attention" in rule.megatron else layer, "e": 0}
            assert rule.pattern.format(indices) in messages[rule.megatron]
            for hf_name in rule.hf_for(indices):
                assert hf_name in messages[rule.megatron]


@pytest.mark.parametrize(("layout", "share"), [("ep2", 1 / 2), ("ep4", 1 / 4), ("etp2", 1 / 2), ("pp2ep2", 1 / 4)])
def test_every_rank_reads_only_the_experts_it_holds(cases, layout, share):
    case, fields = cases["mixtral"], layout_fields(layout)
    total = sum(tensor.nbytes for name, tensor in case.weights.items() if ".experts." in name)

    def bytes_read():
        from megatron.bridge.conversion.hf import HFWeights

        read, original = [], HFWeights.read

        def counting(self, name, slices=None):
            tensor = original(self, name, slices)
            read.append(tensor.nbytes if ".experts." in name else 0)
            return tensor

        HFWeights.read = counting
        AutoBridge.from_hf_pretrained(case.folder).to_megatron_model(**fields)
        return sum(read)

    for count in run_ranks(ranks_of(fields), bytes_read):
        assert count == share * total


def stacked_round_trip(folder, state):
    """In one rank: import of transformers' own state dict, in which experts are stacked, and its export."""
    bridge = AutoBridge.from_hf_pretrained(folder)
    table = bridge.model_bridge.mapping_registry()
    mlp = "model.layers.{l}.mlp"
    stacked = moe_fragments.stacked_experts(f"{mlp}.experts.gate_up_proj", f"{mlp}.experts.down_proj")
    others = [rule for rule in table.rules if "{e}" not in rule.megatron]
    model = bridge.to_megatron_model(load_weights=False, **{EP: 2})
    bridge.model_bridge.mapping_registry = lambda: WeightTable((*others, *stacked))
    bridge.load_hf_weights(model, state)
    exported = dict(bridge.export_hf_weights(model))
    bridge.model_bridge.mapping_registry = lambda: table
    return exported, dict(bridge.export_hf_weights(model))


def test_stacked_experts_are_the_same_experts(cases):
    case = cases["qwen3-moe"]
    state = random_model(CONFIGS["qwen3-moe"]).state_dict()
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    for stacked, single in run_ranks(2, stacked_round_trip, case.folder, state):
        assert stacked.keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in stacked.items())
        expect_same_weights(case, iter(single.items()))


def test_routing_biases_stay_in_fp32(tmp_path):
    save_random_model(Dots1Config(**{**DOTS, "dtype": "bfloat16"}), tmp_path / "made")
    # transformers itself keeps the biases in fp32 when it loads.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    model.get_buffer(bias).add_(torch.rand(8))
    model.save_pretrained(tmp_path / "bf16")
    weights = load_file(tmp_path / "bf16" / "model.safetensors")
    assert weights[bias].dtype == torch.float32
    assert not torch.equal(weights[bias], weights[bias].bfloat16().float())

    def export():
        bridge = AutoBridge.from_hf_pretrained(tmp_path / "bf16")
        model = bridge.to_megatron_model(**{EP: 2})
        bridge.save_hf_pretrained(model, tmp_path / "half", dtype=torch.float16)
        return dict(bridge.export_hf_weights(model))

    for exported in run_ranks(2, export):
        assert all(torch.equal(exported[name], tensor) for name, tensor in weights.items())
        assert {name: tensor.dtype for name, tensor in exported.items()} == {n: t.dtype for n, t in weights.items()}
    half = AutoBridge.from_hf_pretrained(tmp_path / "half").source.weights
    assert torch.equal(half.read(bias), weights[bias])
    assert half["lm_head.weight"].dtype == torch.float16


def test_experts_of_grouped_modules_have_the_same_names():
    # Transformer Engine numbers the weights of one module; elsewhere each expert is a module.
    for own in ("mlp.experts.linear_fc1.weight1", "mlp.experts.local_experts.1.linear_fc1.weight"):
        assert global_expert(own, 4) == "mlp.experts.experts.5.linear_fc1.weight"
    assert global_expert("mlp.linear_fc1.weight", 4) == "mlp.linear_fc1.weight"
    assert global_expert("mlp.shared_experts.linear_fc1.weight", 4) == "mlp.shared_experts.linear_fc1.weight"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({EP: 3}, r"expert_model_parallel_size=3 does not divide num_moe_experts=8; sizes that do: 1, 2, 4, 8"),
        ({ETP: 5}, r"expert_tensor_parallel_size=5 does not divide moe_ffn_hidden_size=96; sizes that do: 1, 2, 3"),
    ],
)
def test_expert_parallelism_that_does_not_fit_says_what_would(cases, fields, message):
    provider = AutoBridge.from_hf_pretrained(cases["mixtral"].folder).to_megatron_provider()
    for name, value in fields.items():
        setattr(provider, name, value)
    with pytest.raises(BridgeError, match=message):
        provider.finalize()


def test_a_world_that_does_not_fit_the_experts_is_refused(cases):
    folder = cases["mixtral"].folder
    with pytest.raises(RankFailed, match=r"experts need a multiple of 4 ranks \(expert 2 x expert tensor 2"):
        run_ranks(2, lambda: AutoBridge.from_hf_pretrained(folder).to_megatron_model(**{TP: 2, EP: 2}))


def test_routing_that_megatron_computes_otherwise_is_refused():
    with pytest.raises(BridgeError, match="every expert the weight 1"):
        softmax_routing(1, normalised=True)
    with pytest.raises(BridgeError, match="norm_topk_prob=False with 4 experts"):
        sigmoid_routing(4, normalised=False, scaling=1.0)
