"""State-space, hybrid and linear-attention models at every layout: transformers' logits and bitwise round trips."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from safetensors.torch import load_file
from transformers import (
    FalconH1Config,
    FalconMambaConfig,
    Mamba2Config,
    MambaConfig,
    NemotronHConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.dist_checkpoint import tensor_index
from megatron.bridge.conversion.inspection import inspect_plan
from megatron.bridge.conversion.logits import megatron_logits
from megatron.bridge.conversion.offline.importer import import_checkpoint
from megatron.bridge.conversion.verify import relative_difference
from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs.state_space import gated_delta_rule, scan_channels, scan_heads
from megatron.bridge.testing import RankFailed, random_model, run_ranks
from megatron.bridge.testing.families import (
    EVERYWHERE,
    compare,
    expect_same_keys,
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
FALCON_H1 = {
    **SIZES,
    **ATTENTION,
    "num_hidden_layers": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 24,
    "mamba_d_ssm": 192,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "pad_token_id": None,  # transformers would leave the padding token's row without a gradient
}
CONFIGS = {
    "mamba2": Mamba2Config(
        **SIZES, num_hidden_layers=2, num_heads=8, head_dim=16, state_size=8, n_groups=2, time_step_limit=(0.1, 0.9)
    ),
    "mamba2-tied": Mamba2Config(
        **SIZES, num_hidden_layers=2, num_heads=4, head_dim=32, state_size=8, n_groups=4, tie_word_embeddings=True
    ),
    "mamba": MambaConfig(**SIZES, num_hidden_layers=2, state_size=8, expand=3, conv_kernel=3),
    "falcon-mamba": FalconMambaConfig(**SIZES, num_hidden_layers=2, state_size=8, tie_word_embeddings=False),
    "nemotron-h": NemotronHConfig(**NEMOTRON_H, hybrid_override_pattern="M-M*-M"),
    "nemotron-h-moe": NemotronHConfig(
        **NEMOTRON_H,
        **MOE,
        moe_shared_expert_intermediate_size=48,
        hybrid_override_pattern="ME*-",
        routed_scaling_factor=2.5,
    ),
    "falcon-h1": FalconH1Config(
        **FALCON_H1,
        attention_in_multiplier=0.9,
        attention_out_multiplier=0.8,
        embedding_multiplier=5.0,
        key_multiplier=0.5,
        lm_head_multiplier=0.3,
        mlp_multipliers=[0.7, 1.4],
        ssm_in_multiplier=1.2,
        ssm_multipliers=[0.3, 0.6, 1.1, 0.8, 1.3],
        ssm_out_multiplier=0.6,
    ),
    "falcon-h1-norm": FalconH1Config(**FALCON_H1, mamba_rms_norm=True, attention_bias=True, mlp_bias=True),
    "falcon-h1-norm-behind": FalconH1Config(**FALCON_H1, mamba_rms_norm=True, mamba_norm_before_gate=False),
    "qwen3.5": Qwen3_5TextConfig(**DELTA_NET, attention_bias=True),
    "qwen3.5-moe": Qwen3_5MoeTextConfig(**QWEN_MOE, layer_types=["full_attention", "linear_attention"] * 2),
    "qwen3-next-moe": Qwen3NextConfig(**QWEN_MOE),
    "qwen3-next-moe-mixed": Qwen3NextConfig(**QWEN_MOE, decoder_sparse_step=2, norm_topk_prob=False),
}
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


@pytest.mark.parametrize("layout", ["ep2", "etp2"])
def test_mixtures_of_experts_over_expert_parallel_ranks(cases, layout):
    found = compare([cases[name] for name in MIXTURES], layout, tolerance=1e-4)
    assert all(difference < TOLERANCE[name] for name, difference in found.items()), found


@pytest.mark.parametrize("name", ["nemotron-h-moe", "qwen3.5", "falcon-h1", "mamba"])
def test_without_any_one_rule_nothing_is_converted(cases, name):
    assert run_ranks(1, refuse_without_any_rule, cases[name])[0] > 10


@pytest.mark.parametrize("name", ["mamba", "nemotron-h-moe", "falcon-h1", "qwen3-next-moe"])
def test_the_table_has_the_keys_of_checkpoints(cases, name):
    run_ranks(1, expect_same_keys, cases[name])


@pytest.mark.parametrize("name", ["mamba", "qwen3.5"])
def test_weights_that_checkpoints_hold_in_parts_are_not_converted_offline(cases, tmp_path, name):
    with pytest.raises(BridgeError, match=r"in parts \(.*in_proj.weight.z.*convert without --offline"):
        import_checkpoint(cases[name].folder, tmp_path / "made")
    assert not (tmp_path / "made").exists()


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
    written = [cases[name] for name in ("mamba", "mamba2", "nemotron-h-moe", "qwen3.5", "falcon-h1")]
    run_ranks(2, save, written, tmp_path, {"tensor_model_parallel_size": 2})
    assert all(run_ranks(2, reload, written, tmp_path, {"pipeline_model_parallel_size": 2}))
    keys = set(tensor_index(tmp_path / "mamba2"))
    # As Megatron-Core's own mixer writes them: blocks of one projection under keys of their own.
    for key in ("in_proj.weight.z", "in_proj.weight.dt", "conv1d.weight.B", "conv1d.bias.x", "A_log", "norm.weight"):
        assert f"decoder.layers.1.mixer.{key}" in keys


def sequence_parallel_logits(case):
    """In one of two tensor-parallel ranks that share sequences outside of their layers."""
    bridge = AutoBridge.from_hf_pretrained(case.folder)
    model = bridge.to_megatron_model(tensor_model_parallel_size=2, sequence_parallel=True)
    return megatron_logits(model, case.tokens[:, :82])[..., : SIZES["vocab_size"]]


@pytest.mark.parametrize("name", ["mamba", "nemotron-h", "falcon-h1", "qwen3.5"])
def test_logits_with_sequence_parallelism(cases, name):
    for logits in run_ranks(2, sequence_parallel_logits, cases[name]):
        assert relative_difference(logits, cases[name].logits[:, :82]) < TOLERANCE[name]


def test_a_transform_of_many_runs_is_shown_in_short(cases):
    rows = {row.megatron: row for row in inspect_plan(cases["qwen3-next-moe"].folder)}
    assert rows["decoder.layers.0.self_attention.in_proj.weight"].transform == "GatherRows(...)"
    assert "('query', 'key', 'value')" in rows["decoder.layers.0.self_attention.conv1d.weight"].shard


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


@pytest.mark.parametrize("name", ["falcon-mamba", "nemotron-h", "qwen3.5", "falcon-h1"])
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


@pytest.mark.parametrize("name", ["mamba", "mamba2", "qwen3.5", "falcon-h1"])
def test_no_state_goes_from_one_packed_document_to_the_next(cases, name):
    packed, apart = run_ranks(1, packed_and_apart, cases[name])[0]
    assert relative_difference(packed, apart) < 1e-5


def bf16_logits(case):
    """In one of two pipeline stages: logits of a model in bf16 whose residual stream is in fp32."""
    bridge = AutoBridge.from_hf_pretrained(case.folder)
    model = bridge.to_megatron_model(dtype=torch.bfloat16, pipeline_model_parallel_size=2)
    return megatron_logits(model, case.tokens)[..., : SIZES["vocab_size"]]


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_residual_stream_in_fp32_goes_with_weights_in_bf16(cases, name):
    assert CONFIGS[name].residual_in_fp32
    for logits in run_ranks(2, bf16_logits, cases[name]):
        assert relative_difference(logits, cases[name].logits) < 5e-2


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
def test_chunks_of_channels_are_their_recurrence(length):
    random = torch.Generator().manual_seed(5)
    x, steps = torch.randn(2, length, 6, generator=random), torch.rand(2, length, 6, generator=random) * 2
    rates = -torch.rand(6, 5, generator=random) * 8
    inputs, outputs = torch.randn(2, 2, length, 5, generator=random)
    state, expected = torch.zeros(2, 6, 5), []
    for t in range(length):
        written = (steps[:, t] * x[:, t])[..., None] * inputs[:, t, None]
        state = (steps[:, t, :, None] * rates).exp() * state + written
        expected.append(torch.einsum("bcn,bn->bc", state, outputs[:, t]))
    assert relative_difference(scan_channels(x, steps, rates, inputs, outputs), torch.stack(expected, 1)) < 1e-5


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
        ("falcon-h1", {"projectors_bias": True}, "projectors_bias=True"),
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
    ("ranks", "fields", "culprit"),
    [
        (4, {"tensor_model_parallel_size": 4}, "mamba_num_groups=2: every rank needs whole groups"),
        (2, {"context_parallel_size": 2}, "context_parallel_size=2: a Mamba mixer needs whole sequences"),
    ],
)
def test_layouts_that_a_mixer_beside_attention_does_not_fit_are_refused(cases, ranks, fields, culprit):
    def build():
        AutoBridge.from_hf_pretrained(cases["falcon-h1"].folder).to_megatron_model(**fields)

    with pytest.raises(RankFailed, match=culprit):
        run_ranks(ranks, build)


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
