"""Dense families beside Llama, Mistral and Qwen: transformers' logits and bitwise round trips at several layouts."""

import json

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron.bridge import AutoBridge
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import FamilyMismatch, RankFailed, check_family, run_ranks
from megatron.bridge.testing.families import EVERYWHERE, compare, family_case, refuse_without_any_rule

TOKENS = {"vocab_size": 131, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32"}
SIZES = {
    **TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2_SIZES = {**TOKENS, "n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 64}
HEAD_16 = {"head_dim": 16}
MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 24}
GPT_NEO = {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 5}


def rope(kind="default", **values):
    return {"rope_type": kind, "rope_theta": 10000.0, **values}


def yarn(**values):
    return rope("yarn", factor=4.0, original_max_position_embeddings=8, **values)


# case -> (transformers' model type, its configuration beside SIZES)
CASES = {
    "ministral": ("ministral", HEAD_16 | MIXED),
    "ministral3": ("ministral3", HEAD_16 | {"rope_parameters": yarn(llama_4_scaling_beta=0.1)}),
    "smollm3": ("smollm3", {}),
    "seed_oss": ("seed_oss", HEAD_16),
    "arcee-biases": ("arcee", HEAD_16 | {"attention_bias": True, "mlp_bias": True}),
    "apertus": ("apertus", {}),
    "granite": ("granite", MULTIPLIERS | {"logits_scaling": 2.0}),
    "granite_swa": ("granite_swa", MULTIPLIERS | MIXED | {"layer_rope_theta": [0, 100.0, 1e4, 0]}),
    "hyperclovax": ("hyperclovax", HEAD_16 | MULTIPLIERS | {"logits_scaling": 0.5}),
    "helium": ("helium", HEAD_16),
    "ernie4_5-biases": ("ernie4_5", HEAD_16 | {"use_bias": True}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3-two-ropes": (
        "olmo3",
        {"sliding_window": 5, "rope_parameters": {"sliding_attention": rope(), "full_attention": yarn()}},
    ),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", HEAD_16 | CAPS | {"sliding_window": 5}),
    "gemma3": ("gemma3_text", HEAD_16 | MIXED | {"query_pre_attn_scalar": 24}),
    "vaultgemma": ("vaultgemma", HEAD_16 | CAPS | {"sliding_window": 5}),
    "phi": ("phi", {}),
    "phi3-window": ("phi3", {"sliding_window": 5}),
    "starcoder2": ("starcoder2", {}),
    "stablelm-bias": ("stablelm", {"use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "nemotron": ("nemotron", HEAD_16),
    "jais2": ("jais2", HEAD_16),
    "glm": ("glm", HEAD_16),
    "glm4": ("glm4", HEAD_16),
    "cohere-norms": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", HEAD_16 | MIXED),
    "exaone4": ("exaone4", HEAD_16 | MIXED),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": None}),
    "gpt_neox-serial": ("gpt_neox", {"num_key_value_heads": None, "use_parallel_residual": False}),
    "persimmon": ("persimmon", {"num_key_value_heads": None}),
    "hunyuan": ("hunyuan_v1_dense", HEAD_16 | {"rope_parameters": rope("dynamic", alpha=8.0, factor=1.0)}),
    "gpt2": ("gpt2", None),
    "gpt_bigcode": ("gpt_bigcode", None),
    "gpt_bigcode-multi-head": ("gpt_bigcode", {"multi_query": False}),
    "gptj": ("gptj", {"rotary_dim": 8}),
    "codegen": ("codegen", {"rotary_dim": 8, "n_head": 8}),
    "nanochat": ("nanochat", {}),
    "gpt_neo": ("gpt_neo", GPT_NEO),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "biogpt": ("biogpt", {}),
    "xglm": ("xglm", {"ffn_dim": 96}),
    "ctrl": ("ctrl", {"dff": 96}),
    "cwm": ("cwm", HEAD_16 | MIXED | {"mlp_bias": True}),
    "falcon-7b": ("falcon", {}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "falcon-serial": ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    "bloom-6-heads": ("bloom", {"hidden_size": 96, "n_layer": 4, "n_head": 6}),
    "mpt-6-heads": ("mpt", {"d_model": 96, "n_heads": 6, "n_layers": 4, "max_seq_len": 64}),
}
OWN_SIZES = {
    "gpt2": GPT2_SIZES,
    "gpt_bigcode": GPT2_SIZES,
    "gptj": GPT2_SIZES,
    "codegen": GPT2_SIZES,
    "ctrl": GPT2_SIZES,
    "gpt_neo": TOKENS | {"hidden_size": 64, "max_position_embeddings": 64},
    "bloom": TOKENS,
    "mpt": TOKENS,
}


def make_config(name):
    kind, changes = CASES[name]
    values = {**OWN_SIZES.get(kind, SIZES), **(changes or {})}
    return CONFIG_MAPPING[kind](**{key: value for key, value in values.items() if value is not None})


CONFIGS = {name: make_config(name) for name in CASES}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: family_case(config, root / name, name) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("layout", EVERYWHERE)
def test_logits_and_round_trip(cases, layout):
    assert compare(list(cases.values()), layout).keys() == CASES.keys()


@pytest.mark.parametrize("layout", ["vpp2", "tp4", "sp2", "cp2"])
def test_families_with_most_differences_at_further_layouts(cases, layout):
    names = ("olmo3-two-ropes", "gemma2", "cohere-norms", "gpt2", "hunyuan", "falcon-40b", "opt", "ctrl", "xglm")
    compare([cases[name] for name in names], layout)


@pytest.mark.parametrize("name", ["phi", "glm4", "olmo2", "gpt2", "hunyuan"])
def test_without_any_one_rule_nothing_is_converted(cases, name):
    assert run_ranks(1, refuse_without_any_rule, cases[name])[0] > 8


def test_every_architecture_is_offered_under_its_own_name(cases):
    offered = AutoBridge.list_supported_models()
    stated = {AutoBridge.from_hf_pretrained(case.folder).hf_config.architectures[0] for case in cases.values()}
    assert stated <= set(offered)
    assert len(stated) == 46


@pytest.mark.parametrize(
    ("kind", "changes", "culprit"),
    [
        ("olmo", {"clip_qkv": 3.0}, "clip_qkv=3.0"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm=True"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm=True"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("ministral3", {"rope_parameters": rope("yarn", factor=4.0)}, "llama_4_scaling_beta"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("llama", {"hidden_act": "gelu_tanh"}, "'gelu_tanh' is not supported"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("xglm", {"pad_token_id": 5}, "pad_token_id=5"),
        ("xglm", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("ctrl", {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon=1e-05"),
        ("falcon", {"alibi": True}, "alibi=True"),
        ("mpt", {"attn_config": {"alibi": False}}, "alibi"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ("exaone4", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
    ],
)
def test_what_a_family_cannot_express_is_refused_by_name(kind, changes, culprit):
    config = CONFIG_MAPPING[kind](**{**OWN_SIZES.get(kind, SIZES), **changes})
    with pytest.raises(BridgeError, match=culprit):
        provider_of(kind, config)


def provider_of(kind, config):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    return AutoBridge.from_hf_config(config).to_megatron_provider()


def test_variants_that_need_our_modules_are_refused_under_another_spec(cases):
    def build():
        return AutoBridge.from_hf_pretrained(cases["gemma2"].folder).to_megatron_model(layer_spec="local")

    with pytest.raises(RankFailed, match="use layer_spec='torch'"):
        run_ranks(1, build)


# Published under names of their own, and Llama's class in transformers.
LLAMAS = {"InternLM3ForCausalLM": "internlm3", "IQuestCoderForCausalLM": "iquestcoder"}


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_by_other_names(name, tmp_path):
    config = CONFIG_MAPPING[LLAMAS[name]](**SIZES, **HEAD_16, attention_bias=True, mlp_bias=True)
    case = family_case(config, tmp_path, name)
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stated | {"architectures": [name]}))
    assert AutoBridge.from_hf_pretrained(tmp_path).hf_config.architectures == [name]
    assert compare([case], "tp2").keys() == {name}


def test_the_kit_in_three_lines():
    differences = check_family(make_config("starcoder2"), layouts=["single"])
    assert 0 <= differences["single"] < 1e-5


def test_the_kit_tells_a_wrong_family(monkeypatch):
    from megatron.bridge.models.families.granite import GraniteBridge

    monkeypatch.setattr(GraniteBridge, "differences", lambda self: {})
    with pytest.raises(FamilyMismatch, match=r"single.*GraniteConfig"):
        check_family(make_config("granite"), layouts=["single"])
