"""Multi-latent attention at every layout: transformers' logits, bitwise round trips, and nothing left over."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Mistral4Config, Mistral4ForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.transforms import InMemory, PermuteRows
from megatron.bridge.conversion.verify import relative_difference
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import RankFailed, run_ranks
from megatron.bridge.testing.families import (
    compare,
    expect_same_keys,
    expect_same_weights,
    family_case,
    refuse_without_any_rule,
)

# transformers has it as the language half of a vision model only.
AutoModelForCausalLM.register(Mistral4Config, Mistral4ForCausalLM, exist_ok=True)

SIZES = {
    "vocab_size": 131,  # prime: no tensor-parallel size divides it
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
    # Every size another one.
    "q_lora_rank": 36,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
MOE = {
    **SIZES,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}
GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}


def yarn(**values):
    parameters = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
    return {"rope_parameters": parameters | values}


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.1, 2.2, 2.3],
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}

# case -> (transformers' model type, its configuration)
CASES = {
    "deepseek-v2": ("deepseek_v2", MOE),
    "deepseek-v2-lite": ("deepseek_v2", MOE | {"q_lora_rank": None, "rms_norm_eps": 1e-5}),
    "deepseek-v2-groups": (
        "deepseek_v2",
        MOE | GROUPS | {"topk_method": "group_limited_greedy"} | yarn(mscale=0.7, mscale_all_dim=0.7),
    ),
    "deepseek-v3": (
        "deepseek_v3",
        MOE | GROUPS | yarn(mscale=1.0, mscale_all_dim=0.5) | {"num_nextn_predict_layers": 0},
    ),
    "deepseek-v3-many": ("deepseek_v3", MOE | GROUPS | {"num_experts_per_tok": 4, "topk_group": 3}),
    "deepseek-v3-halves": ("deepseek_v3", MOE | yarn() | {"rope_interleave": False, "q_lora_rank": None}),
    "glm4-moe-lite": ("glm4_moe_lite", MOE | {"rms_norm_eps": 1e-5}),
    "mistral4": ("mistral4", MOE | yarn(mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)),
    "youtu": ("youtu", SIZES),
    "minicpm3": ("minicpm3", SIZES | {"v_head_dim": None, "rms_norm_eps": 1e-5}),
    "minicpm3-long": ("minicpm3", SIZES | {"q_lora_rank": None, "rope_parameters": LONG}),
}
CONFIGS = {name: CONFIG_MAPPING[kind](**values) for name, (kind, values) in CASES.items()}
MOE_CASES = [name for name, (_, values) in CASES.items() if "n_routed_experts" in values]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("latent-families")
    return {name: family_case(config, root / name, name) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2"])
def test_logits_and_round_trip(cases, layout):
    assert compare(list(cases.values()), layout).keys() == CONFIGS.keys()


@pytest.mark.parametrize("layout", ["ep2", "tp2ep2", "etp2"])
def test_logits_and_round_trip_of_experts(cases, layout):
    assert len(compare([cases[name] for name in MOE_CASES], layout)) == 8


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3", "minicpm3-long"])
def test_without_any_one_rule_nothing_is_converted(cases, name):
    assert run_ranks(1, refuse_without_any_rule, cases[name])[0] > 10


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3", "youtu"])
def test_the_tables_keys_are_megatron_cores(cases, name):
    run_ranks(1, expect_same_keys, cases[name])


def reload(case, root, written):
    bridge = AutoBridge.from_hf_pretrained(case.folder)
    if written:
        model = bridge.load_megatron_model(root, tensor_model_parallel_size=2)
        expect_same_weights(case, bridge.export_hf_weights(model))
    else:
        bridge.save_megatron_model(bridge.to_megatron_model(pipeline_model_parallel_size=2), root)


def test_a_checkpoint_written_at_one_layout_exports_at_another(cases, tmp_path):
    for written in (False, True):
        run_ranks(2, reload, cases["deepseek-v3-halves"], tmp_path / "saved", written)


def gradients(folder, layout):
    """The whole model's gradients of the second layer's latents, as an optimizer sees them, in one row."""
    from megatron.core.distributed import finalize_model_grads

    [model] = AutoBridge.from_hf_pretrained(folder).to_megatron_model(wrap_with_ddp=True, **layout)
    tokens = torch.arange(48).reshape(2, 24)
    model(tokens, torch.arange(24)[None], None, labels=tokens + 1).sum().backward()
    finalize_model_grads([model])
    attention = model.module.decoder.layers[1].self_attention
    cut = [attention.linear_q_down_proj.weight.main_grad, attention.linear_kv_down_proj.weight.main_grad]
    parts = [[torch.empty_like(grad) for _ in range(torch.distributed.get_world_size())] for grad in cut]
    for part, grad in zip(parts, cut, strict=True):
        torch.distributed.all_gather(part, grad)
    norms = [norm.weight.main_grad for norm in (attention.q_layernorm, attention.kv_layernorm)]
    return torch.cat([*(torch.cat(part).flatten() for part in parts), *norms])


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_gradients_of_the_latents_are_those_of_one_rank(cases, sequence_parallel):
    folder = cases["minicpm3"].folder
    [alone] = run_ranks(1, gradients, folder, {})
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel}
    for found in run_ranks(2, gradients, folder, layout):
        assert relative_difference(found, alone) < 1e-5


@pytest.mark.parametrize(
    ("kind", "changes", "culprit"),
    [
        ("deepseek_v3", {"attention_bias": True}, "attention_bias=True under multi-latent attention"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        ("youtu", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ],
)
def test_what_a_family_cannot_express_is_refused_by_name(kind, changes, culprit):
    config = CONFIG_MAPPING[kind](**{**MOE, **changes})
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    with pytest.raises(BridgeError, match=culprit):
        AutoBridge.from_hf_config(config).to_megatron_provider()


def test_latents_that_ranks_cannot_divide_are_refused(cases):
    provider = AutoBridge.from_hf_pretrained(cases["youtu"].folder).to_megatron_provider()
    provider.tensor_model_parallel_size, provider.q_lora_rank = 2, 35
    with pytest.raises(BridgeError, match=r"tensor_model_parallel_size=2 does not divide q_lora_rank=35"):
        provider.finalize()


def test_the_stock_local_modules_are_refused(cases):
    def build():
        return AutoBridge.from_hf_pretrained(cases["youtu"].folder).to_megatron_model(layer_spec="local")

    with pytest.raises(RankFailed, match="'local' cannot do multi_latent_attention=True"):
        run_ranks(1, build)


def test_permuted_rows_come_back_and_are_read_in_parts():
    rows = torch.arange(24.0).reshape(12, 2)
    transform = PermuteRows((0, 2, 1, 4, 3, 5))
    forward = transform.forward([InMemory(rows)], ((0, 12), (0, 2)))
    assert not torch.equal(forward, rows)
    assert torch.equal(transform.inverse(forward)[0], rows)
    for start, stop in [(0, 4), (3, 7), (5, 12), (8, 9)]:
        assert torch.equal(transform.forward([InMemory(rows)], ((start, stop), (0, 2))), forward[start:stop])
