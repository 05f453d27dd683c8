"""Classification and reward heads on decoder families: transformers' logits, round trips, pooling, losses."""

import json

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.heads import head_of, headed_architectures
from megatron.bridge.conversion.logits import megatron_logits
from megatron.bridge.conversion.reference import logits_of, model_class
from megatron.bridge.conversion.verify import relative_difference, verify
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import RankFailed, random_model, run_ranks, save_random_model
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
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CAPS = {"head_dim": 16, "final_logit_softcapping": 3.0, "sliding_window": 5, "query_pre_attn_scalar": 24}
GPT2 = {**TOKENS, "n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 64}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 36,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
DELTA = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
REWARD, TAGS = {"num_labels": 1}, {"num_labels": 7}

# architecture -> (transformers' model type, its configuration)
CASES = {
    "LlamaForSequenceClassification": ("llama", SIZES | REWARD),
    "LlamaForTokenClassification": ("llama", SIZES | TAGS | {"tie_word_embeddings": True}),
    "Qwen2ForSequenceClassification": ("qwen2", SIZES | REWARD | {"pad_token_id": None}),
    "Qwen3ForTokenClassification": ("qwen3", SIZES | TAGS | {"head_dim": 16}),
    "MistralForSequenceClassification": ("mistral", SIZES),
    "MixtralForSequenceClassification": ("mixtral", SIZES | EXPERTS),
    "Gemma2ForSequenceClassification": ("gemma2", SIZES | CAPS),
    "Gemma3TextForSequenceClassification": ("gemma3_text", SIZES | {"head_dim": 16}),
    "Phi3ForSequenceClassification": ("phi3", SIZES),
    "PhiForTokenClassification": ("phi", SIZES | TAGS),
    "GPT2ForSequenceClassification": ("gpt2", GPT2 | REWARD),
    "GPT2ForTokenClassification": ("gpt2", GPT2 | TAGS),
    "BloomForTokenClassification": ("bloom", TOKENS | TAGS | {"hidden_size": 64, "n_layer": 4, "n_head": 4}),
    "DeepseekV3ForTokenClassification": ("deepseek_v3", SIZES | LATENT | TAGS),
    "Qwen3NextForSequenceClassification": ("qwen3_next", SIZES | DELTA | REWARD),
    "OPTForSequenceClassification": ("opt", SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
}
CONFIGS = {name: CONFIG_MAPPING[kind](**values, architectures=[name]) for name, (kind, values) in CASES.items()}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("heads")
    return {name: family_case(config, root / name, name) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("layout", EVERYWHERE)
def test_logits_of_every_token_and_round_trip(cases, layout):
    assert compare(list(cases.values()), layout).keys() == CASES.keys()


def test_without_any_one_rule_nothing_is_converted(cases):
    assert run_ranks(1, refuse_without_any_rule, cases["GPT2ForTokenClassification"])[0] > 8


def sequence_parallel(case):
    model = AutoBridge.from_hf_pretrained(case.folder).to_megatron_model(
        tensor_model_parallel_size=2, sequence_parallel=True
    )
    logits = megatron_logits(model, case.tokens)
    (model[0](case.tokens, torch.arange(24)[None], None).square().sum()).backward()
    return relative_difference(logits, case.logits), model[0].output_layer.weight.grad


def test_sequence_parallel_ranks_hold_the_parts_of_the_heads_gradient(cases):
    case = cases["LlamaForSequenceClassification"]
    (first, own), (_, other) = run_ranks(2, sequence_parallel, case)
    assert first < 1e-5
    reference = random_model(CONFIGS["LlamaForSequenceClassification"])
    hidden = reference.model(case.tokens).last_hidden_state
    reference.score(hidden).square().sum().backward()
    assert relative_difference(own + other, reference.score.weight.grad) < 1e-5


def saved_and_loaded(case, root):
    bridge = AutoBridge.from_hf_pretrained(case.folder)
    bridge.save_megatron_model(bridge.to_megatron_model(tensor_model_parallel_size=2), root / "megatron")
    again = AutoBridge.from_megatron_checkpoint(root / "megatron")
    model = again.load_megatron_model(root / "megatron", tensor_model_parallel_size=2)
    again.save_hf_pretrained(model, root / "hf")
    return verify(case.folder, megatron_path=root / "megatron", tensor_model_parallel_size=2).to_json()


@pytest.mark.parametrize("name", ["Gemma2ForSequenceClassification", "GPT2ForTokenClassification"])
def test_a_megatron_checkpoint_and_a_folder_that_transformers_loads(cases, tmp_path, name):
    certificate = run_ranks(2, saved_and_loaded, cases[name], tmp_path, timeout=180)[0]
    assert certificate["passed"], certificate
    assert certificate["architecture"] == name
    config = CONFIGS[name]
    model = model_class(config).from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == name
    for key, value in model.state_dict().items():
        assert torch.equal(value, cases[name].weights[key]), key


def pooled(case, rows):
    model = AutoBridge.from_hf_pretrained(case.folder).to_megatron_model()
    return model[0].last_token_logits(megatron_logits(model, rows), rows)


@pytest.mark.parametrize("name", ["MistralForSequenceClassification", "GPT2ForSequenceClassification"])
def test_the_last_token_that_is_not_padding_speaks_for_a_sequence(cases, name):
    rows = cases[name].tokens.clone().clamp(min=1)
    rows[0, 15:] = 0
    with torch.no_grad():
        expected = random_model(CONFIGS[name])(rows).logits
    ours = run_ranks(1, pooled, cases[name], rows)[0]
    assert ours.shape == (2, CONFIGS[name].num_labels)
    assert relative_difference(ours, expected) < 1e-5


def test_several_sequences_need_a_token_for_padding(cases):
    case = cases["Qwen2ForSequenceClassification"]
    with pytest.raises(RankFailed, match="a batch of 2 sequences and no pad_token_id"):
        run_ranks(1, pooled, case, case.tokens)
    alone = run_ranks(1, pooled, case, case.tokens[:1])[0]
    assert relative_difference(alone, case.logits[:1, -1]) < 1e-5


def loss_and_gradients(case, labels):
    model = AutoBridge.from_hf_pretrained(case.folder).to_megatron_model(tensor_model_parallel_size=2)[0].eval()
    losses = model(case.tokens, torch.arange(24)[None], None, labels=labels)
    losses.mean().backward()
    return losses.detach(), model.output_layer.weight.grad, model.output_layer.bias.grad


def test_labels_of_every_token_have_transformers_loss_and_gradients(cases):
    case = cases["GPT2ForTokenClassification"]
    labels = torch.randint(0, 7, (2, 24), generator=torch.Generator().manual_seed(4))
    reference = random_model(CONFIGS["GPT2ForTokenClassification"])
    loss = reference(case.tokens, labels=labels).loss
    loss.backward()
    for losses, weight, bias in run_ranks(2, loss_and_gradients, case, labels):
        assert losses.shape == (2, 24)
        torch.testing.assert_close(losses.mean(), loss)
        torch.testing.assert_close(weight, reference.classifier.weight.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bias, reference.classifier.bias.grad, rtol=1e-4, atol=1e-6)


def test_a_reward_head_leaves_its_loss_to_the_caller(cases):
    case = cases["LlamaForSequenceClassification"]

    def forward():
        model = AutoBridge.from_hf_pretrained(case.folder).to_megatron_model()[0]
        model(case.tokens, torch.arange(24)[None], None, labels=torch.zeros(2, 24, dtype=torch.long))

    with pytest.raises(RankFailed, match="a reward or value head .* has no cross entropy"):
        run_ranks(1, forward)


def with_new_head(folder, root):
    bridge = AutoBridge.from_hf_pretrained(folder).with_new_head()
    model = bridge.to_megatron_model(tensor_model_parallel_size=2)
    bridge.save_hf_pretrained(model, root / "hf")
    tokens = torch.arange(48).view(2, 24)
    return megatron_logits(model, tokens), model[0].output_layer.weight.detach()


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_starts_from_a_language_model(tmp_path, tied):
    config = CONFIG_MAPPING["qwen2"](**SIZES, tie_word_embeddings=tied)
    weights = save_random_model(config, tmp_path / "base")
    (logits, head), (_, other) = run_ranks(2, with_new_head, tmp_path / "base", tmp_path)
    assert torch.equal(head, other)  # the same random head on every rank
    assert 0.01 < head.std() < 0.03
    model = model_class(CONFIGS["Qwen2ForSequenceClassification"]).from_pretrained(tmp_path / "hf")
    assert model.config.architectures == ["Qwen2ForSequenceClassification"]
    state = model.state_dict()
    assert state.keys() - weights.keys() == {"score.weight"}
    assert all(torch.equal(state[name], weights[name]) for name in state.keys() & weights.keys())
    assert relative_difference(logits, logits_of(model, torch.arange(48).view(2, 24))) < 1e-5


def test_a_head_that_transformers_does_not_build_is_refused():
    config = CONFIG_MAPPING["olmo2"](**SIZES, architectures=["Olmo2ForCausalLM"])
    with pytest.raises(BridgeError, match=r"no token classification head on Olmo2ForCausalLM .*Olmo2ForSequence"):
        AutoBridge.from_hf_config(config).with_new_head(per_token=True)


def more_labels(case, root):
    bridge = AutoBridge.from_hf_pretrained(case.folder)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.num_labels = 5
    bridge.save_hf_pretrained(provider.provide_distributed_model(wrap_with_ddp=False), root / "hf")


def test_a_changed_number_of_labels_reaches_the_configuration(cases, tmp_path):
    run_ranks(1, more_labels, cases["MistralForSequenceClassification"], tmp_path)
    assert len(json.loads((tmp_path / "hf/config.json").read_text())["id2label"]) == 5
    model = model_class(CONFIGS["MistralForSequenceClassification"]).from_pretrained(tmp_path / "hf")
    assert model.score.out_features == 5


def test_the_dropout_of_a_token_classifier_is_the_configurations():
    def dropout(**values):
        config = CONFIG_MAPPING["qwen3"](**SIZES, architectures=["Qwen3ForTokenClassification"], **values)
        return AutoBridge.from_hf_config(config).to_megatron_provider().head_dropout

    assert (dropout(), dropout(classifier_dropout=0.3), dropout(classifier_dropout=0.0)) == (0.1, 0.3, 0.0)


def test_every_headed_decoder_of_transformers_is_found_and_named_as_there():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kinds = {architecture: kind for kind, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    names = headed_architectures()
    assert set(CASES) <= set(names) <= set(AutoBridge.list_supported_models(heads=True))
    assert len(names) >= 60
    for name in names:
        head = head_of(name)
        config = CONFIG_MAPPING[kinds[head.decoder]](num_labels=3, architectures=[name])
        for field, value in {"head_dim": 64, "num_key_value_heads": config.num_attention_heads}.items():
            if getattr(config, field, value) is None:  # some configurations' own defaults build no model
                setattr(config, field, value)
        with torch.device("meta"):
            model = model_class(config)._from_config(config)
        theirs = {key: tuple(value.shape) for key, value in model.state_dict().items() if key.count(".") == 1}
        expected = {f"{head.weight}.weight": (3, config.hidden_size)}
        expected |= {f"{head.weight}.bias": (3,)} if head.has_bias(config) else {}
        assert {key: theirs[key] for key in theirs if key.startswith(("score.", "classifier."))} == expected, name


@pytest.mark.parametrize(
    "name",
    [
        "BertForSequenceClassification",
        "LlamaForQuestionAnswering",
        # On a decoder that is one part of several.
        "Qwen3_5ForSequenceClassification",
        "Qwen3_5ForTokenClassification",
    ],
)
def test_a_head_without_an_offered_decoder_is_unknown(name):
    config = CONFIG_MAPPING["llama"](**SIZES, architectures=[name])
    assert not AutoBridge.supports(config)
    with pytest.raises(BridgeError, match=name):
        AutoBridge.from_hf_config(config)
