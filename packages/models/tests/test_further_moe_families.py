"""Further mixtures of experts: transformers' logits and bitwise round trips at several layouts."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.offline import export_checkpoint, import_checkpoint
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import random_model, run_ranks, save_random_model
from megatron.bridge.testing.families import (
    EXPERTS_EVERYWHERE,
    compare,
    compare_in_rank,
    expect_same_keys,
    expect_same_weights,
    family_case,
    refuse_without_any_rule,
)
from megatron.bridge.testing.layouts import EP, ETP, SP, TP, ranks_of

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
    "granitemoe_swa": ("granitemoe_swa", GRANITE | MIXED | {"layer_rope_theta": [0, 9.0, 1e4, 0]}),
    "flint": (
        "flint",
        HEAD_16 | MIXED | EXPERTS | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    ),
    "kolibri1": (
        "kolibri1",
        HEAD_16 | MIXED | EXPERTS | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    ),
    "kolibri1-normalised": ("kolibri1", HEAD_16 | MIXED | EXPERTS | {"norm_topk_prob": True}),
    "aria_text": ("aria_text", {"moe_num_experts": 8, "moe_topk": 3}),
    "gpt_oss": ("gpt_oss", LOCAL_EXPERTS | HEAD_16 | {"sliding_window": 5}),
    "llama4_text": (
        "llama4_text",
        HEAD_16
        | {"num_local_experts": 8, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2}
        | {"attention_chunk_size": 7, "no_rope_layer_interval": 2, "floor_scale": 4},
    ),
    "llama4_text-plain": (
        "llama4_text",
        HEAD_16
        | {"num_local_experts": 8, "use_qk_norm": False, "attn_temperature_tuning": False, "attention_bias": True},
    ),
}
CONFIGS = {name: CONFIG_MAPPING[kind](**{**SIZES, **changes}) for name, (kind, changes) in CASES.items()}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("further-moe-families")
    return {name: family_case(config, root / name, name) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("layout", [*EXPERTS_EVERYWHERE, "tp2ep2"])
def test_logits_and_round_trip(cases, layout):
    # Variants of a family differ in what no layout cuts.
    chosen = [case for name, case in cases.items() if layout in ("single", "tp2") or "-" not in name]
    # One set of ranks has one layout, and gpt-oss takes another one of experts there.
    chosen = [case for case in chosen if case.name != "gpt_oss" or not layout.startswith("tp2")]
    assert len(compare(chosen, layout)) == len(chosen)


# Experts with biases stay whole unless this says otherwise.
DIVIDED = {ETP: 2, TP: 2}


@pytest.mark.parametrize("fields", [{TP: 2}, DIVIDED, DIVIDED | {EP: 2}, DIVIDED | {SP: True}, {ETP: 4}], ids=str)
def test_biases_of_divided_experts(cases, fields):
    (found, *_) = run_ranks(ranks_of(fields), compare_in_rank, [cases["gpt_oss"]], fields, "torch")
    assert found["gpt_oss"] < 1e-5


@pytest.mark.parametrize("name", ["afmoe", "cohere2_moe", "ernie4_5_moe", "gpt_oss", "llama4_text", "phimoe"])
def test_the_table_has_the_checkpoints_keys_and_no_rule_to_spare(cases, name):
    run_ranks(1, expect_same_keys, cases[name])
    assert run_ranks(1, refuse_without_any_rule, cases[name])[0] > 8


def load_and_export(folders):
    """In one rank: what comes out of the checkpoints."""
    for case, folder in folders:
        model = AutoBridge.from_megatron_checkpoint(folder).load_megatron_model(folder, expert_model_parallel_size=2)
        expect_same_weights(case, AutoBridge.from_hf_pretrained(case.folder).export_hf_weights(model))
    return True


def test_checkpoints_converted_offline_load_and_come_back(cases, tmp_path):
    chosen = [(cases[name], tmp_path / name) for name in ("afmoe", "ernie4_5_moe", "gpt_oss", "llama4_text")]
    for case, folder in chosen:
        import_checkpoint(case.folder, folder)
        export_checkpoint(folder, tmp_path / "back", overwrite=True)
        expect_same_weights(case, iter(load_file(tmp_path / "back" / "model.safetensors").items()))
    assert all(run_ranks(2, load_and_export, chosen))


def test_every_architecture_is_offered_under_its_own_name(cases):
    stated = {AutoBridge.from_hf_pretrained(case.folder).hf_config.architectures[0] for case in cases.values()}
    assert stated <= set(AutoBridge.list_supported_models())
    assert len(stated) == len({kind for kind, _ in CASES.values()})


def with_gradients_for_weights(model):
    for parameter in model.parameters():
        parameter.data = parameter.grad
    return model


def gradients_in_training(folder, tokens):
    """In one rank, by Hugging Face name."""
    bridge = AutoBridge.from_hf_pretrained(folder)
    (model,) = bridge.to_megatron_model(layer_spec="torch")
    torch.manual_seed(5)
    positions = torch.arange(tokens.shape[1])[None]
    model.train()(tokens, positions, None, labels=tokens.roll(-1, 1)).sum().backward()
    return {name: tensor.clone() for name, tensor in bridge.export_hf_weights([with_gradients_for_weights(model)])}


def test_sparsemixer_draws_and_learns_as_in_transformers(tmp_path):
    config = CONFIG_MAPPING["phimoe"](
        **{**SIZES, **CASES["phimoe"][1], "pad_token_id": None, "router_aux_loss_coef": 0.0}
    )
    save_random_model(config, tmp_path / "model")
    tokens = torch.randint(0, 131, (1, 24), generator=torch.Generator().manual_seed(3))
    (found,) = run_ranks(1, gradients_in_training, tmp_path / "model", tokens)
    model = random_model(config).train()
    torch.manual_seed(5)
    logits = model(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="sum").backward()
    with_gradients_for_weights(model).save_pretrained(tmp_path / "gradients")
    wanted = load_file(tmp_path / "gradients" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() < max(1e-4 * gradient.abs().max(), 1e-5), name


def export_in_half(folder, to):
    """In one rank: the weights of a model in the folder's own dtype, saved in fp16 besides."""
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = bridge.to_megatron_model(expert_model_parallel_size=2, wrap_with_ddp=True)
    bridge.save_hf_pretrained(model, to, dtype=torch.float16)
    return dict(bridge.export_hf_weights(model))


def test_routers_that_transformers_keeps_in_fp32_stay_in_fp32(tmp_path):
    config = CONFIG_MAPPING["ernie4_5_moe"](**{**SIZES, **CASES["ernie4_5_moe"][1], "dtype": "bfloat16"})
    save_random_model(config, tmp_path / "made")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    router = "model.layers.1.mlp.gate.weight"
    model.get_parameter(router).data.add_(torch.rand(8, 64))
    model.save_pretrained(tmp_path / "bf16")
    weights = load_file(tmp_path / "bf16" / "model.safetensors")
    assert not torch.equal(weights[router], weights[router].bfloat16().float())
    for exported in run_ranks(2, export_in_half, tmp_path / "bf16", tmp_path / "half"):
        assert exported.keys() == weights.keys()
        for name, tensor in weights.items():
            assert exported[name].dtype == tensor.dtype, name
            assert torch.equal(exported[name], tensor), name
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert torch.equal(half[router], weights[router])
    assert half["model.norm.weight"].dtype == torch.float16


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
        ("gpt_oss", LOCAL_EXPERTS | {"swiglu_alpha": 1.5}, "swiglu_alpha=1.5"),
        ("gpt_oss", LOCAL_EXPERTS | {"attention_bias": False}, "attention_bias=False"),
        ("llama4_text", HEAD_16 | {"num_experts_per_tok": 2}, "num_experts_per_tok=2"),
        ("cohere2_moe", EXPERTS | {"expert_selection_fn": "hash"}, "expert_selection_fn='hash'"),
    ],
)
def test_what_a_family_cannot_express_is_refused_by_name(kind, changes, culprit):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = CONFIG_MAPPING[kind](**{**SIZES, **changes})
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    with pytest.raises(BridgeError, match=culprit):
        AutoBridge.from_hf_config(config).to_megatron_provider()
