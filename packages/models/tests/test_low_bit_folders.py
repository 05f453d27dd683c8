"""Models whose weights are in few bits: imported live and offline, verified, inspected; FP8 written and read again."""

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, Qwen3MoeConfig
from transformers.integrations.finegrained_fp8 import Fp8Quantize, _dequantize_fp8_weight
from transformers.utils.quantization_config import FineGrainedFP8Config

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.inspection import inspect_plan
from megatron.bridge.conversion.logits import megatron_logits
from megatron.bridge.conversion.offline import export_checkpoint, import_checkpoint
from megatron.bridge.conversion.verify import relative_difference, verify
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import RankFailed, run_ranks, save_random_model

TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
LAYOUTS = {"single": (1, {}), "tp2": (2, {TP: 2}), "pp2": (2, {PP: 2}), "ep2": (2, {EP: 2})}
SIZES = {
    "vocab_size": 131,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "dtype": "float32",
}
CONFIGS = {
    # A feed-forward size that ends in the middle of a block.
    "llama": LlamaConfig(**SIZES, intermediate_size=320),
    "qwen3-moe": Qwen3MoeConfig(
        **SIZES, intermediate_size=256, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, head_dim=64
    ),
}
TOKENS = torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(3))


def quantise(folder, target):
    AutoBridge.from_hf_pretrained(folder).save_hf_pretrained(
        AutoBridge.from_hf_pretrained(folder).to_megatron_model(**{TP: 2}), target, quantization="fp8-block"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> (folder, its weights, the FP8 folder made of it, that one's tensors)"""
    root, found = tmp_path_factory.mktemp("low-bit"), {}
    for name, config in CONFIGS.items():
        weights = save_random_model(config, root / name)
        run_ranks(2, quantise, root / name, root / f"{name}-fp8")
        found[name] = root / name, weights, root / f"{name}-fp8", load_file(root / f"{name}-fp8" / "model.safetensors")
    return found


def decoded(tensors):
    """The weights that an FP8 folder stands for, by transformers' arithmetic."""
    return {
        name: tensor
        if tensor.dtype == torch.float32
        else _dequantize_fp8_weight(tensor, tensors[f"{name}_scale_inv"], [128, 128], torch.float32)
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_fp8_is_written_as_transformers_quantises(folders, name):
    _, weights, folder, tensors = folders[name]
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = FineGrainedFP8Config(**stated)
    reference = Fp8Quantize(type("Quantizer", (), {"quantization_config": config}))
    kept = {name for name in weights if tensors[name].dtype == torch.float32}
    compared = 0
    for key, weight in weights.items():
        if key in kept:
            assert torch.equal(tensors[key], weight)
        elif all(size % 128 == 0 for size in weight.shape):
            for part, value in reference._quantize_one(key, weight).items():
                assert torch.equal(tensors[part].float(), value.float()), part
            compared += 1
    assert compared >= 8
    assert {name.rsplit(".", 2)[-2] for name in weights.keys() - kept} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    not_converted = {f"{module}.weight" for module in stated["modules_to_not_convert"]}
    assert not_converted == {key for key in kept if weights[key].ndim > 1}
    # Nothing is further off than half a step of float8, relative to its block's largest.
    for key, value in decoded(tensors).items():
        assert (value - weights[key]).abs().max() <= weights[key].abs().max() / 16


def comes_back(folder, tensors, layout, target):
    """In one rank: what an FP8 folder is imported as, and exported as without quantisation."""
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = bridge.to_megatron_model(**layout)
    exported = {key: tensor.clone() for key, tensor in bridge.export_hf_weights(model)}
    reference = decoded(tensors)
    assert exported.keys() == reference.keys()
    assert all(torch.equal(exported[key], reference[key]) for key in reference)
    bridge.save_hf_pretrained(model, target)
    return True


@pytest.mark.parametrize(
    ("name", "layout"), [("llama", "tp2"), ("llama", "pp2"), ("qwen3-moe", "tp2"), ("qwen3-moe", "ep2")]
)
def test_an_fp8_folder_is_imported_as_the_values_it_stands_for(folders, tmp_path, name, layout):
    _, _, folder, tensors = folders[name]
    ranks, fields = LAYOUTS[layout]
    assert all(run_ranks(ranks, comes_back, folder, tensors, fields, tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == decoded(tensors).keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_offline_conversion_reads_and_writes_fp8(folders, tmp_path, name):
    _, _, folder, tensors = folders[name]
    import_checkpoint(folder, tmp_path / "megatron", workers=2)
    export_checkpoint(tmp_path / "megatron", tmp_path / "full")
    full, reference = load_file(tmp_path / "full" / "model.safetensors"), decoded(tensors)
    assert full.keys() == reference.keys()
    assert all(torch.equal(full[key], reference[key]) for key in full)
    assert "quantization_config" not in json.loads((tmp_path / "full" / "config.json").read_text())
    # In small files, so that scales lie apart from their weights.
    export_checkpoint(tmp_path / "megatron", tmp_path / "fp8", quantization="fp8-block", max_shard_bytes=70_000)
    files = list((tmp_path / "fp8").glob("*.safetensors"))
    again = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert len(files) > 3
    assert again.keys() == tensors.keys()
    # The values are float8's already: of another round only the scales' rounding is left.
    for key, value in decoded(again).items():
        torch.testing.assert_close(value, reference[key], rtol=1e-6, atol=0)
    stated = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert stated == json.loads((folder / "config.json").read_text())["quantization_config"]


def certificate(folder, layout):
    return verify(folder, **layout)


def test_verify_and_inspect_understand_low_bit_folders(folders):
    _, weights, folder, _ = folders["qwen3-moe"]
    result = run_ranks(2, certificate, folder, {EP: 2})[0]
    assert result.passed
    assert (result.low_bit, result.weights_compared) == ("fp8", len(weights))
    assert result.logit_difference < 1e-5
    rows = {row.megatron: row for row in inspect_plan(folder)}
    expert = rows["decoder.layers.1.mlp.experts.experts.3.linear_fc2.weight"]
    assert (expert.shape, expert.dtype, expert.nbytes) == ((256, 128), "float32", 256 * 128 * 4)


def test_another_quantisation_is_refused_before_anything_is_written(folders, tmp_path):
    folder = folders["llama"][0]

    def save():
        bridge = AutoBridge.from_hf_pretrained(folder)
        bridge.save_hf_pretrained(bridge.to_megatron_model(), tmp_path / "out", quantization="int4")

    with pytest.raises(RankFailed, match="quantization 'int4' cannot be written; only 'fp8-block' can"):
        run_ranks(1, save)
    assert not list(tmp_path.iterdir())


def test_fp8_export_refuses_matrices_that_it_has_no_form_for(tmp_path):
    from transformers import GPT2Config

    save_random_model(GPT2Config(vocab_size=131, n_embd=64, n_layer=2, n_head=4, dtype="float32"), tmp_path / "gpt2")
    import_checkpoint(tmp_path / "gpt2", tmp_path / "megatron")
    with pytest.raises(BridgeError, match=r"h\.0\.attn\.c_attn\.weight is stored transposed"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out", quantization="fp8-block")
    assert not (tmp_path / "out").exists()


def in_four_bits(folder, target):
    """A copy of a Llama in packed integers, by compressed-tensors' own arithmetic; returns its scheme."""
    scheme = QuantizationScheme.model_validate(
        {
            "targets": ["Linear"],
            "format": "pack-quantized",
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
        }
    )
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj.weight" not in name:
            stored[name] = weight
            continue
        scale = weight.unflatten(1, (-1, 32)).abs().amax(-1) / 7.5
        parts = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        stored |= {name.removesuffix("weight") + part: tensor.contiguous() for part, tensor in parts.items()}
    target.mkdir()
    save_file(stored, target / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }
    (target / "config.json").write_text(json.dumps(config))


def logits_of(folder, layout):
    bridge = AutoBridge.from_hf_pretrained(folder)
    return megatron_logits(bridge.to_megatron_model(**layout), TOKENS)[..., :131]


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_packed_integers_compute_what_transformers_computes(folders, tmp_path, layout):
    in_four_bits(folders["llama"][0], tmp_path / "int4")
    ranks, fields = LAYOUTS[layout]
    ours = run_ranks(ranks, logits_of, tmp_path / "int4", fields)[0]
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "int4", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    with torch.no_grad():
        assert relative_difference(ours, model(TOKENS).logits) < 1e-5
    # and not what the weights were before
    assert relative_difference(ours, run_ranks(1, logits_of, folders["llama"][0], {})[0]) > 1e-2
