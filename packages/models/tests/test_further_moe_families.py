"""Further mixtures of experts: transformers' logits and bitwise round trips at several layouts."""

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron.bridge import AutoBridge
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import run_ranks
from megatron.bridge.testing.families import EXPERTS_EVERYWHERE, compare, family_case, refuse_without_any_rule

SIZES = {
    "vocab_size": 131,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3}
LOCAL_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 3}
SHARED = EXPERTS | {"num_shared_experts": 2, "moe_intermediate_size": 32}
HEAD_16 = {"head_dim": 16}
MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
SPARSE_LAST = {"mlp_layer_types": ["dense", *["sparse"] * 3]}
GRANITE = LOCAL_EXPERTS | {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
}


def rope(kind="default", **values):
    return {"rope_type": kind, "rope_theta": 10000.0, **values}


ROPES = {"rope_parameters": {"sliding_attention": rope(), "full_attention": rope(rope_theta=500.0)}}
LONGROPE = rope(
    "longrope",
    short_factor=[1.0, 1.5] * 4,
    long_factor=[2.0, 3.0] * 4,
    original_max_position_embeddings=16,
    short_mscale=1.2,
    long_mscale=1.2,
)

# case -> (transformers' model type, its configuration beside SIZES)
CASES = {
    "olmoe": ("olmoe", EXPERTS),
    "olmoe-normalised": ("olmoe", EXPERTS | {"norm_topk_prob": True, "attention_bias": True}),
    "flex_olmo": ("flex_olmo", EXPERTS),
    "granitemoe": ("granitemoe", GRANITE),
    "granitemoeshared": ("granitemoeshared", GRANITE | {"shared_intermediate_size": 48, "tie_word_embeddings": True}),
    "minimax_m2": ("minimax_m2", LOCAL_EXPERTS | {"head_dim": 32}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", HEAD_16 | {"num_experts": 8, "moe_topk": 3}),
    "phimoe": ("phimoe", LOCAL_EXPERTS | {"num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True}),
    "phimoe-longrope": ("phimoe", LOCAL_EXPERTS | {"num_experts_per_tok": 2, "rope_parameters": LONGROPE}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 32}),
    "afmoe": ("afmoe", SHARED | HEAD_16 | MIXED | {"num_dense_layers": 1, "route_scale": 2.0, "mup_enabled": True}),
    "hy_v3": ("hy_v3", SHARED | HEAD_16),
    "mellum": ("mellum", EXPERTS | HEAD_16 | MIXED | ROPES | SPARSE_LAST | {"moe_intermediate_size": 32}),
    "cohere2_moe": (
        "cohere2_moe",
        HEAD_16 | MIXED | EXPERTS | SPARSE_LAST | {"num_shared_experts": 2, "prefix_dense_intermediate_size": 48},
    ),
    "cohere2_moe-sigmoid": (
        "cohere2_moe",
        HEAD_16
        | EXPERTS
        | {"num_shared_experts": 1, "shared_expert_combination_strategy": "sum", "expert_selection_fn": "sigmoid"}
        | {"norm_topk_prob": False, "rms_norm_eps": 1e-5},
    ),
}
CONFIGS = {name: CONFIG_MAPPING[kind](**{**SIZES, **changes}) for name, (kind, changes) in CASES.items()}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("further-moe-families")
    return {name: family_case(config, root / name, name) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("layout", EXPERTS_EVERYWHERE)
def test_logits_and_round_trip(cases, layout):
    # Variants of a family differ in what no layout cuts.
    chosen = [case for name, case in cases.items() if layout in ("single", "tp2") or "-" not in name]
    assert len(compare(chosen, layout)) == len(chosen)


@pytest.mark.parametrize("name", ["afmoe", "cohere2_moe", "ernie4_5_moe", "granitemoeshared", "phimoe"])
def test_without_any_one_rule_nothing_is_converted(cases, name):
    assert run_ranks(1, refuse_without_any_rule, cases[name])[0] > 8


def test_every_architecture_is_offered_under_its_own_name(cases):
    stated = {AutoBridge.from_hf_pretrained(case.folder).hf_config.architectures[0] for case in cases.values()}
    assert stated <= set(AutoBridge.list_supported_models())
    assert len(stated) == len({kind for kind, _ in CASES.values()})


@pytest.mark.parametrize(
    ("kind", "changes", "culprit"),
    [
        ("olmoe", EXPERTS | {"clip_qkv": 3.0}, "clip_qkv=3.0"),
        ("hunyuan_v1_moe", HEAD_16 | {"num_experts": 8, "moe_topk": [2, 2, 3, 3]}, r"moe_topk differs.*\[2, 3\]"),
        ("phimoe", LOCAL_EXPERTS, "SparseMixer chooses 2 experts per token, not 3"),
        ("phimoe", LOCAL_EXPERTS | {"num_experts_per_tok": 2, "input_jitter_noise": 0.1}, "input_jitter_noise=0.1"),
        ("phimoe", LOCAL_EXPERTS | {"rope_parameters": LONGROPE | {"long_mscale": 1.3}}, "longrope with one mscale"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias=True"),
        ("afmoe", SHARED | {"attention_bias": True}, "attention_bias=True"),
        ("hy_v3", SHARED | {"mlp_bias": True}, "mlp_bias=True"),
        ("cohere2_moe", EXPERTS | {"expert_selection_fn": "hash"}, "expert_selection_fn='hash'"),
    ],
)
def test_what_a_family_cannot_express_is_refused_by_name(kind, changes, culprit):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = CONFIG_MAPPING[kind](**{**SIZES, **changes})
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    with pytest.raises(BridgeError, match=culprit):
        AutoBridge.from_hf_config(config).to_megatron_provider()
