"""Gemma 4: transformers' logits and gradients, bitwise round trips, checkpoints, and what is refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma4TextConfig

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.logits import megatron_logits
from megatron.bridge.conversion.offline import export_checkpoint, import_checkpoint
from megatron.bridge.conversion.verify import relative_difference
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import RankFailed, random_model, run_ranks
from megatron.bridge.testing.families import (
    compare,
    expect_same_keys,
    expect_same_weights,
    family_case,
    refuse_without_any_rule,
)
from megatron.bridge.testing.layouts import layout_fields, ranks_of

SIZES = {
    **{"vocab_size": 131, "vocab_size_per_layer_input": 131, "pad_token_id": None, "dtype": "float32"},
    **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "max_position_embeddings": 64},
    **{"head_dim": 16, "global_head_dim": 32, "sliding_window": 5, "final_logit_softcapping": 30.0},
}
# The published models have five layers with a window before each without.
TWO = ["sliding_attention", "full_attention"]
KEYS_AS_VALUES = {"num_global_key_value_heads": 2, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0}
EXPERTS = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 32}
CONFIGS = {
    # As E2B: inputs per layer, keys and values shared by the last layers, whose MLPs are twice as wide.
    "small": Gemma4TextConfig(
        **{**SIZES, "layer_types": TWO * 4, "num_hidden_layers": 8, "num_key_value_heads": 1},
        **{"num_kv_shared_layers": 4, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 24},
    ),
    # As 31B: layers without a window have fewer key/value heads, and take their values from their keys.
    "large": Gemma4TextConfig(
        **{**SIZES, "layer_types": TWO * 2, "num_hidden_layers": 4, "num_key_value_heads": 4, **KEYS_AS_VALUES}
    ),
    # As 26B-A4B: experts beside each MLP besides.
    "experts": Gemma4TextConfig(
        **{**SIZES, "layer_types": TWO * 2, "num_hidden_layers": 4, "num_key_value_heads": 4, **KEYS_AS_VALUES},
        **EXPERTS,
    ),
    "alike": Gemma4TextConfig(
        **SIZES
        | {"global_head_dim": 16, "layer_types": TWO * 2, "num_hidden_layers": 4, "num_key_value_heads": 2}
        | {"hidden_size_per_layer_input": 24, "vocab_size_per_layer_input": 140, "attention_bias": True},
    ),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("gemma4")
    return {name: family_case(config, root / name, name) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2", "vpp2", "cp2", "tp2pp2sp"])
def test_logits_and_round_trip(cases, layout):
    assert compare(list(cases.values()), layout).keys() == CONFIGS.keys()


def test_the_stock_local_modules_compute_the_same(cases):
    compare([cases[name] for name in ("small", "large", "experts")], "single", "local")


@pytest.mark.parametrize("layout", ["ep2", "etp2", "tp2ep2sp"])
def test_experts_over_ranks(cases, layout):
    compare([cases["experts"]], layout)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_has_the_checkpoints_keys_and_no_rule_to_spare(cases, name):
    run_ranks(1, expect_same_keys, cases[name])
    assert run_ranks(1, refuse_without_any_rule, cases[name])[0] > 10


def gradients_of_transformers(case, config, folder):
    """By the names that a checkpoint's files have; the scalars of layers are no parameters."""
    model = random_model(config)
    logits = model(case.tokens).logits
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), case.tokens.roll(-1, 1).flatten(), reduction="sum"
    ).backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    model.save_pretrained(folder)
    gradients = load_file(folder / "model.safetensors")
    return {name: gradient for name, gradient in gradients.items() if not name.endswith("layer_scalar")}


def forward_step(rows, chunk):
    tokens = next(rows)
    positions = torch.arange(tokens.shape[1])[None]
    losses = chunk(tokens, positions, None, labels=tokens.roll(-1, 1))
    return losses, lambda output: (output.sum(), torch.tensor(output.numel()), {})


def gradients(cases, layout):
    """In one rank: of the same loss through Megatron-Core's schedule, a row per micro-batch."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    found = {}
    for case in cases:
        bridge = AutoBridge.from_hf_pretrained(case.folder)
        options = {"calculate_per_token_loss": True, "layer_spec": "torch", "wrap_with_ddp": True}
        chunks = bridge.to_megatron_model(**layout, **options)
        rows = case.tokens.split(1)
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(rows) for _ in chunks] if len(chunks) > 1 else iter(rows),
            model=chunks,
            num_microbatches=len(rows),
            seq_length=case.tokens.shape[1],
            micro_batch_size=1,
        )
        finalize_model_grads(chunks)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data = parameter.main_grad.clone()
        found[case.name] = {key: tensor.clone() for key, tensor in bridge.export_hf_weights(chunks)}
    return found


@pytest.mark.parametrize("layout", ["tp2", "sp2", "pp2", "vpp2"])
def test_gradients_are_those_of_transformers(cases, tmp_path, layout):
    fields = layout_fields(layout)
    # Megatron-Core trains mixtures of experts over tensor-parallel ranks with sequence parallelism only.
    chosen = [cases[name] for name in CONFIGS if name != "alike" and (layout != "tp2" or name != "experts")]
    found = run_ranks(ranks_of(fields), gradients, chosen, fields, timeout=200)[0]
    for case in chosen:
        wanted = gradients_of_transformers(case, CONFIGS[case.name], tmp_path / case.name)
        assert wanted.keys() <= found[case.name].keys()
        apart = {name: relative_difference(found[case.name][name], gradient) for name, gradient in wanted.items()}
        assert max(apart.values()) < 1e-4, max(apart, key=apart.get)


def save(cases, root, layout):
    for case in cases:
        bridge = AutoBridge.from_hf_pretrained(case.folder)
        bridge.save_megatron_model(bridge.to_megatron_model(**layout), root / case.name)


def load(cases, root, layout):
    for case in cases:
        bridge = AutoBridge.from_megatron_checkpoint(root / case.name)
        model = bridge.load_megatron_model(root / case.name, **layout)
        expect_same_weights(case, bridge.export_hf_weights(model))
        assert relative_difference(megatron_logits(model, case.tokens)[..., :131], case.logits) < 1e-5


def test_a_checkpoint_written_at_one_layout_computes_the_same_at_another(cases, tmp_path):
    chosen = [cases[name] for name in ("small", "large", "experts")]
    run_ranks(2, save, chosen, tmp_path, layout_fields("tp2"), timeout=120)
    run_ranks(2, load, chosen, tmp_path, layout_fields("pp2"), timeout=120)


def test_offline_conversion_in_both_directions(cases, tmp_path):
    for name, case in cases.items():
        import_checkpoint(case.folder, tmp_path / name)
        export_checkpoint(tmp_path / name, tmp_path / "back", overwrite=True)
        expect_same_weights(case, iter(load_file(tmp_path / "back" / "model.safetensors").items()))
    run_ranks(2, load, list(cases.values()), tmp_path, layout_fields("tp2"), timeout=120)


def test_keys_of_layers_that_have_none_may_lie_in_files(cases, tmp_path):
    case, folder = cases["small"], tmp_path / "published"
    shutil.copytree(case.folder, folder)
    extra = {f"model.layers.6.self_attn.{name}": torch.zeros(16, 64) for name in ("k_proj.weight", "v_proj.weight")}
    save_file(
        {**case.weights, **extra, "model.layers.6.self_attn.k_norm.weight": torch.zeros(16)},
        folder / "model.safetensors",
    )
    run_ranks(1, load_folder, case, folder)
    save_file({**case.weights, "model.layers.3.self_attn.q_proj.bias": torch.zeros(16)}, folder / "model.safetensors")
    with pytest.raises(RankFailed, match=r"without a rule.*\n.*layers\.3\.self_attn\.q_proj\.bias"):
        run_ranks(1, load_folder, case, folder)


def load_folder(case, folder):
    bridge = AutoBridge.from_hf_pretrained(folder)
    expect_same_weights(case, bridge.export_hf_weights(bridge.to_megatron_model()))


@pytest.mark.parametrize(
    ("name", "fields", "culprit"),
    [
        ("small", {"num_layers": 4}, "num_layers=4, and heterogeneous_layers describes 8"),
        (
            "small",
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
            "cannot be recomputed whole; set recompute_granularity to 'selective'",
        ),
        ("large", {"num_labels": 2}, "heterogeneous layers have no heads"),
    ],
)
def test_what_such_layers_cannot_do_is_refused(cases, name, fields, culprit):
    def build():
        AutoBridge.from_hf_pretrained(cases[name].folder).to_megatron_model(**{"layer_spec": "torch", **fields})

    with pytest.raises(RankFailed, match=culprit):
        run_ranks(1, build)


def test_heads_of_single_layers_that_ranks_cannot_divide_are_named(cases):
    provider = AutoBridge.from_hf_pretrained(cases["large"].folder).to_megatron_provider()
    layers = provider.heterogeneous_layers
    layers.sizes[1]["num_query_groups"] = 3
    with pytest.raises(BridgeError, match="layer 1: num_attention_heads=4 is not a multiple of num_query_groups=3"):
        provider.finalize()


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ({"num_kv_shared_layers": 7}, "num_kv_shared_layers=7 leaves no layer of the kind full_attention"),
        ({"layer_types": ["chunked_attention"] * 8}, "chunked_attention"),
    ],
)
def test_what_the_family_cannot_express_is_refused_by_name(cases, tmp_path, changes, culprit):
    bridge = AutoBridge.from_hf_pretrained(cases["small"].folder)
    for field, value in changes.items():
        setattr(bridge.hf_config, field, value)
    with pytest.raises(BridgeError, match=culprit):
        bridge.to_megatron_provider()
