"""Text from Megatron models is transformers' own, token for token, at several layouts."""

import dataclasses
import re

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron.bridge import AutoBridge, platform
from megatron.bridge.conversion.logits import megatron_logits
from megatron.bridge.errors import BridgeError
from megatron.bridge.models.generation import Choice, generate
from megatron.bridge.models.generation.last_logits import uncached_because
from megatron.bridge.testing import run_ranks, save_random_model

TP, PP, VPP, CP = (
    f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "virtual_pipeline_model", "context")
)
NEW = 64
SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "dtype": "float32",
    "tie_word_embeddings": False,
}
GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 96}
MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 24}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}
MAMBA = {"state_size": 8, "num_hidden_layers": 2}
# case -> (transformers' model type, its configuration beside SIZES)
CACHED = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 5} | CAPS),
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 24} | MIXED),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", {}),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 4}),
    "mixtral": ("mixtral", EXPERTS),
    "gpt_oss": ("gpt_oss", {"head_dim": 16} | EXPERTS | MIXED),
}
# Those that pipeline stages are tried with.
STAGED = ("llama", "gemma2", "gpt2", "mamba")
WHOLE = {"deepseek_v3": ("deepseek_v3", LATENT), "mamba": ("mamba", MAMBA)}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folders = {}
    for case, (kind, values) in (CACHED | WHOLE).items():
        folders[case] = tmp_path_factory.mktemp(case)
        save_random_model(CONFIG_MAPPING[kind](**(SIZES | values)), folders[case])
    return folders


def prompts(width=7):
    return torch.randint(3, 131, (2, width), generator=torch.Generator().manual_seed(5))


def by_transformers(folder, tokens, **settings):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    mask = torch.ones_like(tokens)
    out = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **settings)
    return out[:, tokens.shape[1] :].tolist()


def opened(folder, **layout):
    return AutoBridge.from_hf_pretrained(folder).to_megatron_model(**layout)


def by_megatron(model, tokens, **settings):
    return torch.stack(list(generate(model, tokens, NEW, vocab_size=131, **settings)), 1).tolist()


def compare(cases, expected, layout):
    for case, folder in cases.items():
        model = opened(folder, **layout)
        assert (uncached_because(model) is None) == (case in CACHED), (case, uncached_because(model))
        assert by_megatron(model, prompts()) == expected[case], case
        platform.destroy_model_parallel()


@pytest.fixture(scope="module")
def expected(cases):
    return {case: by_transformers(folder, prompts()) for case, folder in cases.items()}


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (2, {TP: 2}), (2, {PP: 2})], ids=["single", "tp2", "pp2"])
def test_greedy_text_is_that_of_transformers(cases, expected, ranks, layout):
    tried = {case: folder for case, folder in cases.items() if PP not in layout or case in STAGED}
    run_ranks(ranks, compare, tried, expected, layout)


def read_whole(folder, expected):
    layouts = [{PP: 2, VPP: 2}, {TP: 2, "sequence_parallel": True}, {CP: 2}]
    reasons = ["virtual pipeline stages", "sequence parallelism", "context parallelism"]
    for layout, reason in zip(layouts, reasons, strict=True):
        model = opened(folder, **layout)
        assert uncached_because(model) == reason
        assert by_megatron(model, prompts()) == expected
        platform.destroy_model_parallel()


def test_layouts_without_a_cache_say_the_same(cases, expected):
    run_ranks(2, read_whole, cases["llama"], expected["llama"])


def chosen_in_other_ways(folder, penalised):
    model, tokens = opened(folder, **{TP: 2}), prompts()
    assert by_megatron(model, tokens, choice=Choice(repetition_penalty=1.3)) == penalised
    drawn = Choice(temperature=0.9, top_k=20, top_p=0.9, seed=3)
    model[0].train()
    first, again = (by_megatron(model, tokens, choice=drawn) for _ in range(2))
    assert model[0].training
    other = by_megatron(model, tokens, choice=dataclasses.replace(drawn, seed=4))
    assert by_megatron(model, tokens, choice=Choice(temperature=2.0, top_k=1)) == by_megatron(model, tokens)
    few = Choice(temperature=5.0, top_k=3)
    text = torch.tensor(by_megatron(model, tokens, choice=few))
    logits = megatron_logits(model, torch.cat([tokens, text], 1))[:, tokens.shape[1] - 1 : -1, :131]
    assert (logits.topk(3).indices == text[..., None]).any(-1).all()
    return first, again, other


def test_tokens_are_chosen_as_told_and_alike_on_every_rank(cases):
    penalised = by_transformers(cases["llama"], prompts(), repetition_penalty=1.3)
    (first, again, other), elsewhere = run_ranks(2, chosen_in_other_ways, cases["llama"], penalised)
    assert first == again
    assert first != other
    assert elsewhere == (first, again, other)


def stopped(folder, text):
    model, tokens = opened(folder), prompts()
    stops = {text[0][5], text[1][9]}
    ends = [next(n for n, token in enumerate(row) if token in stops) for row in text]
    said = torch.stack(list(generate(model, tokens, NEW, stops=stops)), 1).tolist()
    assert len(said[0]) == max(ends) + 1
    for row, own, end in zip(said, text, ends, strict=True):
        assert row[: end + 1] == own[: end + 1]
        assert set(row[end:]) == {own[end]}
    with pytest.raises(BridgeError, match=r"7 tokens of the prompt and 90 new ones .* 96 positions"):
        next(generate(model, tokens, 90))
    with pytest.raises(BridgeError, match="at least 1"):
        next(generate(model, tokens[:, :0], 5))


def test_rows_end_at_their_stops_and_too_much_is_refused(cases, expected):
    run_ranks(1, stopped, cases["llama"], expected["llama"])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"top_k": 5}, "set a temperature"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(settings, told):
    with pytest.raises(BridgeError, match=re.escape(told)):
        Choice(**settings)
