"""T5 and its relatives: transformers' logits with and without padding, losses, round trips, checkpoints."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MT5Config, T5Config

from megatron.bridge import AutoBridge, platform
from megatron.bridge.conversion.offline import export_checkpoint, import_checkpoint
from megatron.bridge.conversion.reference import logits_of, model_class
from megatron.bridge.conversion.verify import relative_difference, verify
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import RankFailed, random_model, run_ranks
from megatron.bridge.testing.families import compare, family_case, refuse_without_any_rule

# Heads of other sizes than d_model / num_heads, stacks of different depths, and more positions than buckets.
SIZES = {
    "vocab_size": 131,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
    "dtype": "float32",
}
CONFIGS = {
    "t5": T5Config(**SIZES, architectures=["T5ForConditionalGeneration"]),
    "t5-1.1": T5Config(
        **SIZES,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        architectures=["T5ForConditionalGeneration"],
    ),
    "mt5": MT5Config(**SIZES, architectures=["MT5ForConditionalGeneration"]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("t5")
    return {name: (family_case(config, root / name, name), random_model(config)) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2", "tp2pp2"])
def test_logits_and_round_trip(made, layout):
    assert compare([case for case, _ in made.values()], layout).keys() == CONFIGS.keys()


def test_without_any_one_rule_nothing_is_converted(made):
    assert run_ranks(1, refuse_without_any_rule, made["t5-1.1"][0])[0] > 20


def shown(lengths, longest):
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


SOURCE, TARGET = shown([24, 15], 24), shown([9, 18], 18)
TARGETS = torch.randint(1, 131, (2, 18), generator=torch.Generator().manual_seed(5))


def padded_forward(case, fields, **more):
    model = AutoBridge.from_hf_pretrained(case.folder).to_megatron_model(**fields)[0].eval()
    source, target = (~seen[:, None, None] for seen in (SOURCE, TARGET))
    return model, model(case.tokens, TARGETS, source, target, source, **more)


def gathered(case, fields):
    output = padded_forward(case, fields)[1].detach()
    parts = [torch.empty_like(output) for _ in range(2)]
    torch.distributed.all_gather(parts, output.contiguous())
    return torch.cat(parts, -1)[..., :131]


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_of_source_and_target_is_not_seen(made, name):
    case, reference = made[name]
    with torch.no_grad():
        expected = reference(
            input_ids=case.tokens, attention_mask=SOURCE, decoder_input_ids=TARGETS, decoder_attention_mask=TARGET
        ).logits
    fields = {"tensor_model_parallel_size": 2, "sequence_parallel": name == "t5"}
    ours = run_ranks(2, gathered, case, fields)[0]
    assert relative_difference(ours[TARGET], expected[TARGET]) < 1e-5


LABELS = torch.randint(0, 131, (2, 18), generator=torch.Generator().manual_seed(6))
WATCHED = {
    "encoder_relative_pos_emb.relative_attention_bias.weight": "encoder.block.0.layer.0.SelfAttention."
    "relative_attention_bias.weight",
    "decoder_relative_pos_emb.relative_attention_bias.weight": "decoder.block.0.layer.0.SelfAttention."
    "relative_attention_bias.weight",
    "decoder.layers.1.cross_attention.linear_q.weight": "decoder.block.1.layer.1.EncDecAttention.q.weight",
    "embedding.word_embeddings.weight": "shared.weight",
}


def loss_and_gradients(case, fields):
    model, losses = padded_forward(case, fields, lm_labels=LABELS)
    losses.mean().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if name in WATCHED}
    return losses.detach(), gradients


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_loss_and_gradients_are_transformers(made, sequence_parallel):
    case, reference = made["t5"]
    reference.zero_grad()
    output = reference(
        input_ids=case.tokens,
        attention_mask=SOURCE,
        decoder_input_ids=TARGETS,
        decoder_attention_mask=TARGET,
        labels=LABELS,
    )
    output.loss.backward()
    theirs = dict(reference.named_parameters())
    fields = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel}
    (losses, first), (_, second) = run_ranks(2, loss_and_gradients, case, fields)
    torch.testing.assert_close(losses.mean(), output.loss)
    for own, name in WATCHED.items():
        expected = theirs[name].grad
        ours = first[own] if "relative" in own else torch.cat([first[own], second[own]])[: len(expected)]
        assert relative_difference(ours, expected) < 1e-4, own


PP2, TP2 = {"pipeline_model_parallel_size": 2}, {"tensor_model_parallel_size": 2}


def saved_and_loaded(case, root, at, then):
    bridge = AutoBridge.from_hf_pretrained(case.folder)
    bridge.save_megatron_model(bridge.to_megatron_model(**at), root / "megatron")
    again = AutoBridge.from_megatron_checkpoint(root / "megatron")
    platform.destroy_model_parallel()
    again.save_hf_pretrained(again.load_megatron_model(root / "megatron", **then), root / "hf")
    return verify(case.folder, megatron_path=root / "megatron", **then).to_json()


@pytest.mark.parametrize(("name", "at", "then"), [("t5", PP2, TP2), ("t5-1.1", TP2, PP2)])
def test_a_megatron_checkpoint_and_a_folder_that_transformers_loads(made, tmp_path, name, at, then):
    case, reference = made[name]
    certificate = run_ranks(2, saved_and_loaded, case, tmp_path, at, then, timeout=180)[0]
    assert certificate["passed"], certificate
    model = model_class(CONFIGS[name]).from_pretrained(tmp_path / "hf")
    for key, value in model.state_dict().items():
        assert torch.equal(value, reference.state_dict()[key]), key
    assert torch.equal(logits_of(model, case.tokens), case.logits)


def test_stacks_of_different_depths_go_offline(made, tmp_path):
    case, _ = made["t5-1.1"]
    import_checkpoint(case.folder, tmp_path / "megatron")
    certificate = run_ranks(2, verified, case.folder, tmp_path / "megatron", TP2)[0]
    assert certificate["passed"], certificate
    export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
    exported = load_file(tmp_path / "hf/model.safetensors")
    assert exported.keys() == case.weights.keys()
    assert all(torch.equal(exported[name], case.weights[name]) for name in exported)


def verified(folder, megatron, fields):
    return verify(folder, megatron_path=megatron, **fields).to_json()


def test_an_encoder_that_lacks_a_layer_is_refused_offline(made, tmp_path):
    case, _ = made["t5"]
    shutil.copytree(case.folder, tmp_path / "hf")
    weights = {name: weight for name, weight in case.weights.items() if "encoder.block.1" not in name}
    save_file(weights, tmp_path / "hf/model.safetensors")
    with pytest.raises(BridgeError, match=r"encoder layers without weights: \[1\]"):
        import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_training_on_two_stages_is_refused():
    provider = AutoBridge.from_hf_config(CONFIGS["t5"]).to_megatron_provider()
    provider.pipeline_model_parallel_size = 2
    with pytest.raises(BridgeError, match="converted and run on two pipeline stages, but not trained"):
        provider.provide_distributed_model()


def fresh_positions():
    provider = AutoBridge.from_hf_config(CONFIGS["t5"]).to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    model = provider.provide_distributed_model(wrap_with_ddp=False)[0]
    return model.decoder_relative_pos_emb.relative_attention_bias.weight.detach()


def test_ranks_start_from_the_same_biases_of_positions():
    first, second = run_ranks(2, fresh_positions)
    assert torch.equal(first, second)
    assert first.std() > 0.01


def smaller(case, root):
    provider = AutoBridge.from_hf_pretrained(case.folder).to_megatron_provider(load_weights=False)
    provider.num_layers, provider.encoder_num_layers, provider.vocab_size = 1, 4, 100
    bridge = AutoBridge.from_hf_pretrained(case.folder)
    bridge.save_hf_pretrained(provider.provide_distributed_model(wrap_with_ddp=False), root / "hf")


def test_changed_depths_reach_the_configuration(made, tmp_path):
    run_ranks(1, smaller, made["t5"][0], tmp_path)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"], config["vocab_size"]) == (4, 1, 100)
    assert model_class(CONFIGS["t5"]).from_pretrained(tmp_path / "hf").lm_head.out_features == 100


@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"pipeline_model_parallel_size": 4}, "pipeline_model_parallel_size=4: .* raise tensor_model_parallel_size"),
        ({"fp16": True}, "fp16=True: .* use bf16"),
        ({"position_embedding_type": "rope"}, "T5 has 'relative' only"),
        ({"embedding_multiplier": 2.0}, "embedding_multiplier=2.0: T5 has 1.0 only"),
        ({"layer_spec": "local"}, "layer_spec='local'"),
        ({"tensor_model_parallel_size": 3}, "does not divide num_attention_heads=4"),
    ],
)
def test_what_t5_cannot_be_is_refused_by_name(fields, culprit):
    provider = AutoBridge.from_hf_config(CONFIGS["t5"]).to_megatron_provider()
    for name, value in fields.items():
        setattr(provider, name, value)
    with pytest.raises((BridgeError, RankFailed), match=culprit):
        provider.finalize()


def packed(case):
    from megatron.core.packed_seq_params import PackedSeqParams

    model = AutoBridge.from_hf_pretrained(case.folder).to_megatron_model()[0]
    attention = model.encoder.layers[0].self_attention.core_attention
    states = torch.zeros(4, 4, 16)
    attention(states, states, states, None, None, torch.zeros(1, 4, 4, 4), PackedSeqParams(qkv_format="thd"))


def test_packed_sequences_are_refused(made):
    with pytest.raises(RankFailed, match="packed sequences are not supported"):
        run_ranks(1, packed, made["t5"][0])
