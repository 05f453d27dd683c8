"""Every family at every layout and layer spec: transformers' logits, bitwise round trips, and nothing left over."""

import json

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.logits import megatron_logits
from megatron.bridge.conversion.verify import relative_difference
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import RankFailed, run_ranks
from megatron.bridge.testing.families import compare, family_case, refuse_without_any_rule
from megatron.bridge.testing.layouts import CONTEXT_LAYOUTS, LAYOUTS, SP

TOKENS = torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(3))

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
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


def rope(kind, **values):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **values}}


LLAMA3_ROPE = rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-attention-bias": LlamaConfig(**SIZES, attention_bias=True),
    "llama-mlp-bias": LlamaConfig(**SIZES, mlp_bias=True),
    "llama-head-dim": LlamaConfig(**SIZES, head_dim=24),
    "llama-multi-head": LlamaConfig(**{**SIZES, "num_key_value_heads": 4}),
    "llama-rope-llama3": LlamaConfig(**SIZES, **LLAMA3_ROPE),
    "llama-rope-linear": LlamaConfig(**SIZES, **rope("linear")),
    "llama-rope-yarn": LlamaConfig(**SIZES, **rope("yarn", original_max_position_embeddings=16)),
    "llama-rope-dynamic": LlamaConfig(**{**SIZES, "max_position_embeddings": 8}, **rope("dynamic")),
    "llama-rope-longrope": LlamaConfig(
        **SIZES,
        **rope("longrope", original_max_position_embeddings=16, short_factor=[1.1] * 8, long_factor=[1.0, 2.0] * 4),
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral-window": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-tied-window": Qwen2Config(
        **SIZES, tie_word_embeddings=True, use_sliding_window=True, sliding_window=5, max_window_layers=2
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "qwen3-tied-bias": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True, attention_bias=True),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: family_case(config, root / name, name) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def folders(cases):
    """name -> (folder, its weights, transformers' logits)"""
    return {name: (case.folder, case.weights, case.logits) for name, case in cases.items()}


@pytest.mark.parametrize(
    ("layout", "spec"),
    [
        *((layout, "torch") for layout in (*LAYOUTS, *CONTEXT_LAYOUTS)),
        *((layout, "local") for layout, fields in LAYOUTS.items() if SP not in fields),
    ],
)
def test_logits_and_round_trip(cases, layout, spec):
    assert compare(list(cases.values()), layout, spec).keys() == CONFIGS.keys()


def save_at(folders, root, layout):
    for name, (folder, _, _) in folders.items():
        bridge = AutoBridge.from_hf_pretrained(folder)
        bridge.save_megatron_model(bridge.to_megatron_model(**layout, layer_spec="torch"), root / name)


def reload_and_export(folders, root, layout):
    for name, (_, weights, _) in folders.items():
        bridge = AutoBridge.from_megatron_checkpoint(root / name)
        model = bridge.load_megatron_model(root / name, **layout)
        exported = dict(bridge.export_hf_weights(model))
        assert exported.keys() == weights.keys(), name
        for key, tensor in exported.items():
            assert torch.equal(tensor, weights[key]), f"{name}: {key}"


@pytest.mark.parametrize(("written", "read"), [("tp2", "pp2"), ("vpp2", "tp2"), ("single", "tp2pp2")])
def test_a_checkpoint_written_at_one_layout_exports_at_another(folders, tmp_path, written, read):
    for layout, job in ((written, save_at), (read, reload_and_export)):
        sizes = LAYOUTS[layout]
        run_ranks(sizes.get(TP, 1) * sizes.get(PP, 1), job, folders, tmp_path, sizes)


@pytest.mark.parametrize(("name", "rules"), [("llama-biases", 13), ("qwen3-tied-bias", 12)])
def test_without_any_one_rule_nothing_is_converted_and_the_weights_are_named(cases, name, rules):
    assert run_ranks(1, refuse_without_any_rule, cases[name]) == [rules]


def test_tensor_parallelism_that_does_not_divide_the_heads_says_which_would(folders):
    folder, _, _ = folders["llama"]
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    provider.tensor_model_parallel_size = 3
    with pytest.raises(BridgeError, match=r"does not divide num_attention_heads=4; sizes that do: 1, 2, 4"):
        provider.finalize()
    provider.tensor_model_parallel_size, provider.pipeline_model_parallel_size = 1, 3
    with pytest.raises(BridgeError, match=r"does not divide num_layers=4; numbers of parts that do: 1, 2, 4"):
        provider.finalize()


def test_a_world_that_does_not_fit_the_layout_is_refused(folders):
    folder, _, _ = folders["llama"]
    with pytest.raises(RankFailed, match="needs a multiple of 2 ranks"):
        run_ranks(1, lambda: AutoBridge.from_hf_pretrained(folder).to_megatron_model(**{TP: 2}))


def test_a_configuration_that_does_not_describe_the_weights_is_refused(folders, tmp_path):
    folder, _, _ = folders["llama"]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(RankFailed, match=r"shapes that disagree[\s\S]*mlp\.gate_proj\.weight \[96, 64\]"):
        run_ranks(1, lambda: AutoBridge.from_hf_pretrained(tmp_path).to_megatron_model())


def test_tied_embeddings_that_differ_in_the_file_are_refused(folders):
    folder, weights, _ = folders["llama-tied"]

    def load(head):
        bridge = AutoBridge.from_hf_pretrained(folder)
        model = bridge.to_megatron_model(load_weights=False)
        return len(bridge.load_hf_weights(model, {**weights, "lm_head.weight": head}))

    embedding = weights["model.embed_tokens.weight"]
    assert run_ranks(1, load, embedding.clone()) == [2 + 6 * 4]
    with pytest.raises(RankFailed, match="lm_head.weight differs from model.embed_tokens.weight"):
        run_ranks(1, load, embedding + 1)


def test_padding_of_the_vocabulary_takes_no_part_in_the_loss(folders):
    folder, _, reference = folders["llama"]
    labels = TOKENS.roll(-1, 1)
    wanted = torch.nn.functional.cross_entropy(reference.flatten(0, 1), labels.flatten())

    def loss(divisible_by):
        bridge = AutoBridge.from_hf_pretrained(folder)
        (model,) = bridge.to_megatron_model(make_vocab_size_divisible_by=divisible_by, **{TP: 2})
        positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
        return float(model(TOKENS, positions, None, labels=labels).mean().detach())

    for divisible_by in (1, 128):
        for value in run_ranks(2, loss, divisible_by):
            assert value == pytest.approx(float(wanted), rel=1e-5)


def test_a_changed_model_exports_with_the_configuration_that_describes_it(folders, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, _, _ = folders["llama"]

    def shrink():
        bridge = AutoBridge.from_hf_pretrained(folder)
        model = bridge.to_megatron_model(load_weights=False, num_layers=2, vocab_size=200)
        bridge.save_hf_pretrained(model, tmp_path / "smaller")
        return megatron_logits(model, TOKENS)[..., :200]

    (logits,) = run_ranks(1, shrink)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    assert (model.config.num_hidden_layers, model.config.vocab_size) == (2, 200)
    assert relative_difference(model(TOKENS).logits.detach(), logits) < 1e-5


@pytest.mark.parametrize(("layout", "share"), [("tp2", 1 / 2), ("pp2", 1 / 2), ("tp2pp2", 1 / 4)])
def test_every_rank_reads_only_the_bytes_it_owns(folders, layout, share):
    folder, weights, _ = folders["llama"]
    total = sum(tensor.nbytes for tensor in weights.values())
    # Norms are held by every tensor-parallel rank, and the stages hold embedding and head besides their layers.
    slack = 0.05 * total

    def bytes_read():
        from megatron.bridge.conversion.hf import HFWeights

        read, original = [], HFWeights.read

        def counting(self, name, slices=None):
            tensor = original(self, name, slices)
            read.append(tensor.nbytes)
            return tensor

        HFWeights.read = counting
        AutoBridge.from_hf_pretrained(folder).to_megatron_model(make_vocab_size_divisible_by=1, **LAYOUTS[layout])
        return sum(read)

    sizes = LAYOUTS[layout]
    for count in run_ranks(sizes.get(TP, 1) * sizes.get(PP, 1), bytes_read):
        assert abs(count - share * total) < slack


def test_an_unknown_layout_field_is_refused_with_the_nearest(folders, tmp_path):
    bridge = AutoBridge.from_hf_pretrained(folders["llama"][0])
    for build in (bridge.to_megatron_model, lambda **layout: bridge.load_megatron_model(tmp_path, **layout)):
        with pytest.raises(BridgeError, match="has no field 'tensor_parallel_size'; did you mean"):
            build(tensor_parallel_size=2)
