"""Multi-token prediction against transformers' own `MtpModel`: logits, round trips, and files without these layers."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, Glm4MoeConfig
from transformers.modeling_layers import MtpModel

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.checkpoint_layout import resolve
from megatron.bridge.conversion.logits import megatron_logits
from megatron.bridge.conversion.offline import export_checkpoint, import_checkpoint
from megatron.bridge.conversion.verify import relative_difference
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import RankFailed, run_ranks, save_random_model
from megatron.bridge.testing.layouts import PP, layout_fields, ranks_of

LAYOUTS = ("single", "tp2", "pp2", "ep2", "tp2pp2")
LAYERS = 4
MOE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
LATENTS = {"q_lora_rank": 36, "kv_lora_rank": 24, "qk_nope_head_dim": 20, "qk_rope_head_dim": 8, "v_head_dim": 12}
CONFIGS = {
    "deepseek-v3": DeepseekV3Config(**MOE, **LATENTS, num_key_value_heads=4, num_nextn_predict_layers=2),
    "glm4-moe": Glm4MoeConfig(**MOE, num_key_value_heads=2, head_dim=16, use_qk_norm=True),
    "glm4-moe-tied": Glm4MoeConfig(**MOE, num_key_value_heads=2, tie_word_embeddings=True),
}
TOKENS = torch.randint(0, MOE["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))


def prediction_weights(weights, config):
    """Random prediction layers, each like the decoder's last layer, with the repeated embedding and output layer."""
    torch.manual_seed(7)
    size, last = config.hidden_size, f"model.layers.{LAYERS - 1}."
    made = {}
    for number in range(config.num_nextn_predict_layers):
        layer = f"model.layers.{LAYERS + number}"
        for name, tensor in weights.items():
            if name.startswith(last):
                made[f"{layer}.{name.removeprefix(last)}"] = tensor + 0.1 * torch.randn_like(tensor)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            made[f"{layer}.{norm}.weight"] = 1 + 0.1 * torch.randn(size)
        made[f"{layer}.eh_proj.weight"] = 0.1 * torch.randn(size, 2 * size)
        embedding = weights["model.embed_tokens.weight"]
        made[f"{layer}.embed_tokens.weight"] = embedding.clone()
        made[f"{layer}.shared_head.head.weight"] = weights.get("lm_head.weight", embedding).clone()
    return made


def save_with_predictions(config, folder):
    weights = save_random_model(config, folder)
    weights |= prediction_weights(weights, config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def reference(folder, count):
    """transformers' logits, the decoder's and then each prediction layer's, `[batch, sequence, vocabulary]` each."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    # transformers knows prediction layers by the published models' numbers only.
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS + number}\." for number in range(count)]
    prediction = MtpModel.from_pretrained(model).eval()
    hidden, tokens = model.model(TOKENS).last_hidden_state, TOKENS
    logits = [model.lm_head(hidden)]
    for number in range(count):
        tokens = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], 1)
        positions = torch.arange(tokens.shape[1])[None] + 1 + number
        hidden = prediction.forward_layer(number, hidden, positions, None, input_ids=tokens)
        logits.append(prediction._project_to_logits(hidden))
    return torch.stack(logits)


@torch.no_grad()
def case(config, folder):
    """(folder, its weights, transformers' logits)"""
    weights = save_with_predictions(config, folder)
    return folder, weights, reference(folder, config.num_nextn_predict_layers)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("prediction-layers")
    return {name: case(config, root / name) for name, config in CONFIGS.items()}


def prediction_logits(model, count):
    """Logits of the prediction layers `[count, batch, sequence, vocabulary]`; None on other pipeline stages."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    [chunk] = model
    if not chunk.mtp_process:
        megatron_logits(model, TOKENS)
        return None
    rows = []
    hook = chunk.mtp.register_forward_hook(lambda block, inputs, output: rows.append(output))
    megatron_logits(model, TOKENS)
    hook.remove()
    hidden = torch.cat([row.unflatten(0, (1 + count, -1)) for row in rows[: len(TOKENS)]], 2)[1:]
    weight = chunk.shared_embedding_or_output_weight() if chunk.share_embeddings_and_output_weights else None
    local = torch.stack([chunk.output_layer(each, weight=weight)[0] for each in hidden])
    return gather_from_tensor_model_parallel_region(local).transpose(1, 2)[..., : MOE["vocab_size"]]


def compare(folders, layout):
    """In one rank: largest relative difference of each case's logits; weights are asserted bitwise."""
    found = {}
    for name, (folder, weights, expected) in folders.items():
        bridge = AutoBridge.from_hf_pretrained(folder)
        model = bridge.to_megatron_model(**layout, layer_spec="torch")
        with torch.no_grad():
            ours = prediction_logits(model, len(expected) - 1)
        decoder = megatron_logits(model, TOKENS)[..., : MOE["vocab_size"]]
        found[name] = relative_difference(decoder, expected[0])
        if ours is not None:
            found[name] = max(found[name], relative_difference(ours, expected[1:]))
        assert_same(name, dict(bridge.export_hf_weights(model)), weights)
        assert not bridge.describing(model).changes
    return found


def assert_same(name, exported, weights):
    assert exported.keys() == weights.keys(), name
    for key, tensor in exported.items():
        assert torch.equal(tensor, weights[key]), f"{name}: {key}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_round_trip(folders, layout):
    fields = layout_fields(layout)
    for found in run_ranks(ranks_of(fields), compare, folders, fields):
        assert found.keys() == CONFIGS.keys()
        assert max(found.values()) < 1e-5, found


def reload(folders, root, fields, written):
    for name, (folder, weights, _) in folders.items():
        if written:
            bridge = AutoBridge.from_megatron_checkpoint(root / name)
            assert_same(
                name, dict(bridge.export_hf_weights(bridge.load_megatron_model(root / name, **fields))), weights
            )
        else:
            bridge = AutoBridge.from_hf_pretrained(folder)
            bridge.save_megatron_model(bridge.to_megatron_model(**fields), root / name)


@pytest.mark.parametrize(("written", "read"), [("pp2", "tp2"), ("tp2", "pp2")])
def test_a_checkpoint_written_at_one_layout_exports_at_another(folders, tmp_path, written, read):
    for layout, again in ((written, False), (read, True)):
        run_ranks(2, reload, folders, tmp_path, layout_fields(layout), again)


def described(root):
    """Every key of a checkpoint: shape and dtype of tensors, None for objects."""
    metadata = pickle.loads((resolve(root) / ".metadata").read_bytes())
    return {
        key: (tuple(entry.size), entry.properties.dtype) if hasattr(entry, "size") else None
        for key, entry in metadata.state_dict_metadata.items()
    }


def test_offline_the_same_checkpoint_as_a_model_writes_and_back(folders, tmp_path):
    # One whose files hold none of the layers that its configuration states.
    without = tmp_path / "made", save_random_model(CONFIGS["deepseek-v3"], tmp_path / "made"), None
    for name, (folder, weights, _) in (folders | {"without": without}).items():
        import_checkpoint(folder, tmp_path / "offline" / name)
        run_ranks(1, reload, {name: (folder, weights, None)}, tmp_path / "live", {}, False)
        assert described(tmp_path / "offline" / name) == described(tmp_path / "live" / name), name
        run_ranks(2, reload, {name: (folder, weights, None)}, tmp_path / "offline", {PP: 2}, True)
        export_checkpoint(tmp_path / "live" / name, tmp_path / "hf" / name)
        assert_same(name, dict(load_file(tmp_path / "hf" / name / "model.safetensors")), weights)


def drop_and_return(folder, out):
    """In one rank: what becomes of a model whose files hold no prediction layers, though its configuration says so."""
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = bridge.to_megatron_model()
    bridge.save_hf_pretrained(model, out / "hf")
    bridge.save_megatron_model(model, out / "megatron")
    again = AutoBridge.from_megatron_checkpoint(out / "megatron")
    return dict(again.export_hf_weights(again.load_megatron_model(out / "megatron")))


def test_files_without_these_layers_decide_against_the_configuration(tmp_path):
    weights = save_random_model(CONFIGS["deepseek-v3"], tmp_path / "made")
    assert json.loads((tmp_path / "made/config.json").read_text())["num_nextn_predict_layers"] == 2
    [exported] = run_ranks(1, drop_and_return, tmp_path / "made", tmp_path)
    assert_same("without", exported, weights)
    assert json.loads((tmp_path / "hf/config.json").read_text())["num_nextn_predict_layers"] == 0


def test_files_that_do_not_repeat_the_embedding_come_back_as_they_were(folders, tmp_path):
    folder, weights, _ = folders["deepseek-v3"]
    kept = {
        name: tensor for name, tensor in weights.items() if not name.endswith(("5.embed_tokens.weight", "head.weight"))
    }
    kept["lm_head.weight"] = weights["lm_head.weight"]
    copy_with(folder, tmp_path, kept)

    def export():
        bridge = AutoBridge.from_hf_pretrained(tmp_path)
        return dict(bridge.export_hf_weights(bridge.to_megatron_model()))

    [exported] = run_ranks(1, export)
    assert len(kept) == len(weights) - 3
    assert_same("kept", exported, kept)


def copy_with(folder, target, weights):
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def test_a_repeated_weight_that_differs_is_refused(folders, tmp_path):
    folder, weights, _ = folders["glm4-moe"]
    name = "model.layers.4.shared_head.head.weight"
    copy_with(folder, tmp_path, weights | {name: weights[name] + 1})
    with pytest.raises(RankFailed, match=rf"lm_head.weight and {name} differ"):
        run_ranks(1, lambda: AutoBridge.from_hf_pretrained(tmp_path).to_megatron_model())


def test_files_with_some_of_these_layers_are_refused(folders, tmp_path):
    folder, weights, _ = folders["deepseek-v3"]
    copy_with(folder, tmp_path, {name: weights[name] for name in weights if not name.startswith("model.layers.5.")})
    with pytest.raises(BridgeError, match=r"num_nextn_predict_layers=2, but the files hold \['model.layers.4'\] only"):
        AutoBridge.from_hf_pretrained(tmp_path).to_megatron_provider()


def masked_gradient(folder, mask):
    """In one rank: gradient of the first prediction layer's projection, its loss being masked."""
    [model] = AutoBridge.from_hf_pretrained(folder).to_megatron_model()
    positions = torch.arange(TOKENS.shape[1])[None]
    model.train()
    labels = TOKENS.roll(-1, 1)
    (model(TOKENS, positions, None, labels=labels, loss_mask=mask) * mask).sum().backward()
    return model.mtp.layers[0].eh_proj.weight.grad


def test_the_loss_mask_holds_for_prediction_layers(folders):
    folder = folders["glm4-moe"][0]
    [none] = run_ranks(1, masked_gradient, folder, torch.zeros(TOKENS.shape))
    [some] = run_ranks(1, masked_gradient, folder, torch.ones(TOKENS.shape))
    assert not none.any()
    assert some.any()
