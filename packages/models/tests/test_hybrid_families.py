"""State-space, hybrid and linear-attention models at every layout: transformers' logits and bitwise round trips."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from safetensors.torch import load_file
from transformers import Mamba2Config, NemotronHConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.dist_checkpoint import tensor_index
from megatron.bridge.conversion.logits import megatron_logits
from megatron.bridge.conversion.verify import relative_difference
from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs.state_space import gated_delta_rule, scan_heads
from megatron.bridge.testing import random_model, run_ranks
from megatron.bridge.testing.families import (
    EVERYWHERE,
    compare,
    expect_same_weights,
    family_case,
    refuse_without_any_rule,
)

SIZES = {"vocab_size": 131, "hidden_size": 64, "dtype": "float32"}
ATTENTION = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
NEMOTRON_H = {
    **SIZES,
    **ATTENTION,
    "ssm_state_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 24,
    "n_groups": 2,
}
MOE = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
DELTA_NET = {
    **SIZES,
    **ATTENTION,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "num_hidden_layers": 4,
}
QWEN_MOE = {
    **DELTA_NET,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
CONFIGS = {
    "mamba2": Mamba2Config(
        **SIZES, num_hidden_layers=2, num_heads=8, head_dim=16, state_size=8, n_groups=2, time_step_limit=(0.1, 0.9)
    ),
    "mamba2-tied": Mamba2Config(
        **SIZES, num_hidden_layers=2, num_heads=4, head_dim=32, state_size=8, n_groups=4, tie_word_embeddings=True
    ),
    "nemotron-h": NemotronHConfig(**NEMOTRON_H, hybrid_override_pattern="M-M*-M"),
    "nemotron-h-moe": NemotronHConfig(
        **NEMOTRON_H,
        **MOE,
        moe_shared_expert_intermediate_size=48,
        hybrid_override_pattern="ME*-",
        routed_scaling_factor=2.5,
    ),
    "qwen3.5": Qwen3_5TextConfig(**DELTA_NET, attention_bias=True),
    "qwen3.5-moe": Qwen3_5MoeTextConfig(**QWEN_MOE, layer_types=["full_attention", "linear_attention"] * 2),
    "qwen3-next-moe": Qwen3NextConfig(**QWEN_MOE),
    "qwen3-next-moe-mixed": Qwen3NextConfig(**QWEN_MOE, decoder_sparse_step=2, norm_topk_prob=False),
}
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
EXPERT_LAYOUTS = {"ep2": {EP: 2}, "etp2": {ETP: 2}}
MIXTURES = [name for name in CONFIGS if "moe" in name]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("hybrids")
    # Longer than a chunk of the recurrences, and no multiple of it.
    return {name: family_case(config, root / name, name, length=83) for name, config in CONFIGS.items()}


# Delta nets: at this length one unit in the last place of the embeddings moves transformers' own logits by 1e-5.
DELTA_NETS = [name for name in CONFIGS if name.startswith("qwen")]
TOLERANCE = {name: 1e-4 if name in DELTA_NETS else 1e-5 for name in CONFIGS}


@pytest.mark.parametrize("layout", EVERYWHERE)
def test_logits_and_round_trip(cases, layout):
    found = compare(list(cases.values()), layout, tolerance=1e-4)
    assert found.keys() == CONFIGS.keys()
    assert all(difference < TOLERANCE[name] for name, difference in found.items()), found


def differences(cases, fields):
    """In one rank: largest relative difference of the logits by name; weights are compared bitwise."""
    found = {}
    for case in cases:
        bridge = AutoBridge.from_hf_pretrained(case.folder)
        model = bridge.to_megatron_model(**fields)
        logits = megatron_logits(model, case.tokens)[..., : SIZES["vocab_size"]]
        found[case.name] = relative_difference(logits, case.logits)
        expect_same_weights(case, bridge.export_hf_weights(model))
    return found


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_mixtures_of_experts_over_expert_parallel_ranks(cases, layout):
    found = run_ranks(2, differences, [cases[name] for name in MIXTURES], EXPERT_LAYOUTS[layout])[0]
    assert found.keys() == set(MIXTURES)
    assert all(difference < TOLERANCE[name] for name, difference in found.items()), found


@pytest.mark.parametrize("name", ["mamba2"])
def test_without_any_one_rule_nothing_is_converted(cases, name):
    assert run_ranks(1, refuse_without_any_rule, cases[name])[0] > 8


def save(cases, root, fields):
    for case in cases:
        bridge = AutoBridge.from_hf_pretrained(case.folder)
        bridge.save_megatron_model(bridge.to_megatron_model(**fields), root / case.name)


def reload(cases, root, fields):
    for case in cases:
        bridge = AutoBridge.from_megatron_checkpoint(root / case.name)
        expect_same_weights(case, bridge.export_hf_weights(bridge.load_megatron_model(root / case.name, **fields)))
    return True


def test_a_checkpoint_written_at_one_layout_exports_at_another(cases, tmp_path):
    written = [cases[name] for name in ("mamba2", "nemotron-h-moe", "qwen3.5")]
    run_ranks(2, save, written, tmp_path, {"tensor_model_parallel_size": 2})
    assert all(run_ranks(2, reload, written, tmp_path, {"pipeline_model_parallel_size": 2}))
    keys = set(tensor_index(tmp_path / "mamba2"))
    # As Megatron-Core's own mixer writes them: blocks of one projection under keys of their own.
    for key in ("in_proj.weight.z", "in_proj.weight.dt", "conv1d.weight.B", "conv1d.bias.x", "A_log", "norm.weight"):
        assert f"decoder.layers.1.mixer.{key}" in keys


def become_gradients(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)


def gradients(case, ranks):
    """In one of `ranks` tensor-parallel ranks: the loss's gradients under the weights' Hugging Face names."""
    bridge = AutoBridge.from_hf_pretrained(case.folder)
    (chunk,) = bridge.to_megatron_model(tensor_model_parallel_size=ranks)
    positions = torch.arange(case.tokens.shape[1])[None]
    chunk(case.tokens, positions, None, labels=case.tokens.roll(-1, 1)).mean().backward()
    become_gradients(chunk)
    return dict(bridge.export_hf_weights(chunk))


@pytest.mark.parametrize("name", ["nemotron-h", "qwen3.5"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients(cases, tmp_path, name, ranks):
    case, model = cases[name], random_model(CONFIGS[name])
    logits = model(case.tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), case.tokens.roll(-1, 1).flatten()).backward()
    become_gradients(model)
    model.save_pretrained(tmp_path)
    wanted = load_file(tmp_path / "model.safetensors")
    for found in run_ranks(ranks, gradients, case, ranks):
        assert found.keys() == wanted.keys()
        # Megatron-Core adds up the partial gradients of the norms of queries and keys after the backward pass.
        names = [name for name in wanted if ranks == 1 or "self_attn" not in name]
        apart = {name: relative_difference(found[name], wanted[name]) for name in names}
        assert max(apart.values()) < 1e-4, apart


def packed_and_apart(case):
    """In one rank: logits of two documents in one packed row with padding, and of each by itself."""
    (chunk,) = AutoBridge.from_hf_pretrained(case.folder).to_megatron_model()
    chunk.eval()
    first, second = case.tokens[0, :70], case.tokens[1, :30]
    row = torch.cat([first, first[:5], second])[None]
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=torch.tensor([0, 70, 100], dtype=torch.int32),
        cu_seqlens_kv=torch.tensor([0, 70, 100], dtype=torch.int32),
        cu_seqlens_q_padded=torch.tensor([0, 75, 105], dtype=torch.int32),
        cu_seqlens_kv_padded=torch.tensor([0, 75, 105], dtype=torch.int32),
        max_seqlen_q=75,
        max_seqlen_kv=75,
    )
    with torch.no_grad():
        together = chunk(row, torch.arange(105)[None], None, packed_seq_params=packed)
        single = [chunk(each[None], torch.arange(len(each))[None], None) for each in (first, second)]
    return torch.cat([together[0, :70], together[0, 75:]]), torch.cat(single, 1)[0]


@pytest.mark.parametrize("name", ["mamba2", "qwen3.5"])
def test_no_state_goes_from_one_packed_document_to_the_next(cases, name):
    packed, apart = run_ranks(1, packed_and_apart, cases[name])[0]
    assert relative_difference(packed, apart) < 1e-5


@pytest.mark.parametrize("length", [1, 7, 64, 130])
def test_chunks_of_a_recurrence_are_the_recurrence(length):
    random = torch.Generator().manual_seed(5)
    x = torch.randn(2, length, 4, 3, generator=random)
    steps = torch.rand(2, length, 4, generator=random) * 2
    rates = -torch.rand(4, generator=random) * 8
    inputs, outputs = torch.randn(2, 2, length, 2, 5, generator=random)
    state, expected = torch.zeros(2, 4, 5, 3), []
    for t in range(length):
        given, read = (each[:, t].repeat_interleave(2, 1) for each in (inputs, outputs))
        decay = (steps[:, t] * rates).exp()[..., None, None]
        state = decay * state + (steps[:, t, :, None] * given)[..., None] * x[:, t, :, None]
        expected.append(torch.einsum("bhn,bhnp->bhp", read, state))
    assert relative_difference(scan_heads(x, steps, rates, inputs, outputs), torch.stack(expected, 1)) < 1e-5


@pytest.mark.parametrize("length", [1, 7, 64, 130])
def test_chunks_of_the_delta_rule_are_the_delta_rule(length):
    random = torch.Generator().manual_seed(5)
    queries, keys = torch.nn.functional.normalize(torch.randn(2, 2, length, 3, 6, generator=random), dim=-1)
    values = torch.randn(2, length, 3, 4, generator=random)
    decays, rates = -torch.rand(2, length, 3, generator=random) * 3, torch.rand(2, length, 3, generator=random)
    state, expected = torch.zeros(2, 3, 6, 4), []
    for t in range(length):
        state = state * decays[:, t, :, None, None].exp()
        error = values[:, t] - torch.einsum("bhk,bhkv->bhv", keys[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", keys[:, t], rates[:, t, :, None] * error)
        expected.append(torch.einsum("bhk,bhkv->bhv", queries[:, t] / 6**0.5, state))
    found = gated_delta_rule(queries, keys, values, decays, rates)
    assert relative_difference(found, torch.stack(expected, 1)) < 1e-5


@pytest.mark.parametrize(
    ("name", "changes", "culprit"),
    [
        ("mamba2", {"use_conv_bias": False}, "use_conv_bias=False: not supported in Mamba2Config"),
        ("nemotron-h-moe", {"moe_latent_size": 32, "use_bias": True}, "use_bias=True, moe_latent_size=32"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(cases, name, changes, culprit):
    bridge = AutoBridge.from_hf_pretrained(cases[name].folder)
    for field, value in changes.items():
        setattr(bridge.hf_config, field, value)
    with pytest.raises(BridgeError, match=culprit):
        bridge.to_megatron_provider()


@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"tensor_model_parallel_size": 4}, "does not divide mamba_num_groups=2"),
        ({"hybrid_layer_pattern": "ME*X"}, r"\['X'\] are none of M"),
        ({"hybrid_layer_pattern": "ME*"}, "has 3 layers, num_layers is 4"),
        ({"layer_spec": "local"}, "hybrid models are built of 'torch' modules"),
        ({"post_norm": True}, "BlockVariant"),
    ],
)
def test_a_hybrid_model_that_cannot_be_built_is_refused_with_the_reason(cases, fields, culprit):
    provider = AutoBridge.from_hf_pretrained(cases["nemotron-h-moe"].folder).to_megatron_provider()
    with pytest.raises(BridgeError, match=culprit):
        provider.replace(**fields).finalize()
