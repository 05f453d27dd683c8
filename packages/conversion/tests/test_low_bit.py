"""Weights in few bits: decoded as transformers and compressed-tensors do, part for part, or refused by name."""

import json
import math

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron.bridge.conversion.hf import HFSource
from megatron.bridge.conversion.transforms import whole
from megatron.bridge.conversion.weight_source import open_weights
from megatron.bridge.errors import BridgeError

GENERATOR = torch.Generator().manual_seed(11)
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def random(*shape):
    return torch.randn(shape, generator=GENERATOR)


def opened(folder, tensors, config, dtype=torch.bfloat16):
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    stated = {} if config is None else {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **stated}))
    return open_weights(HFSource(folder), dtype)


def read(source, name):
    return source.read(name, whole(source.shapes[name]))


def expect_parts(source, name, count=40):
    """Any part of a weight is that part of the whole, bit for bit."""
    full = read(source, name)
    assert (tuple(full.shape), full.dtype) == (source.shapes[name], source.dtypes[name])
    for _ in range(count):
        region = []
        for size in full.shape:
            start, stop = sorted(torch.randint(0, size + 1, (2,), generator=GENERATOR).tolist())
            region.append((start, stop))
        assert torch.equal(source.read(name, tuple(region)), full[tuple(slice(*span) for span in region)])


def in_fp8(weight, block):
    """Some float8 numbers with scales in `block`s; how good they are does not matter here."""
    grid = [*weight.shape[:-2], *(-(-size // each) for size, each in zip(weight.shape[-2:], block, strict=True))]
    return (weight * 40).to(torch.float8_e4m3fn), random(*grid).abs() / 40


@pytest.mark.parametrize("shape", [(300, 520), (64, 64), (128, 256), (1100, 1)])
def test_fp8_blocks_are_decoded_as_transformers_does(tmp_path, shape):
    weight, scale = in_fp8(random(*shape), (128, 128))
    source = opened(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale, "n.weight": random(7)}, FP8)
    reference = _dequantize_fp8_weight(weight, scale, [128, 128], torch.float32).bfloat16()
    assert torch.equal(read(source, "a.weight"), reference)
    assert source.shapes == {"a.weight": shape, "n.weight": (7,)}
    assert source.dtypes == {"a.weight": torch.bfloat16, "n.weight": torch.float32}
    expect_parts(source, "a.weight")


def test_fp8_experts_with_scales_as_powers_of_two(tmp_path):
    weight, _ = in_fp8(random(3, 256, 384), (128, 128))
    exponents = torch.randint(100, 140, (3, 2, 3), dtype=torch.uint8, generator=GENERATOR)
    dequantize = Fp8Dequantize(None)
    for scale in (exponents, exponents.view(torch.float8_e8m0fnu)):
        source = opened(tmp_path, {"e.down_proj": weight, "e.down_proj_scale_inv": scale}, FP8, torch.float32)
        reference = dequantize._dequantize_one(weight, scale, torch.float32)
        assert torch.equal(read(source, "e.down_proj"), reference)
        expect_parts(source, "e.down_proj")


def test_fp8_with_one_scale_per_weight(tmp_path):
    weight, _ = in_fp8(random(96, 160), (96, 160))
    for scale in (torch.tensor(0.25), torch.tensor([0.75])):
        tensors = {"a.weight": weight, "a.weight_scale_inv": scale, "a.activation_scale": torch.tensor(3.0)}
        source = opened(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": None})
        assert list(source.shapes) == ["a.weight"]
        assert torch.equal(read(source, "a.weight"), (weight.float() * scale).bfloat16())
        expect_parts(source, "a.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_is_decoded_as_transformers_does(tmp_path, dtype):
    blocks = torch.randint(0, 256, (3, 70, 4, 16), dtype=torch.uint8, generator=GENERATOR)
    scales = torch.randint(100, 140, (3, 70, 4), dtype=torch.uint8, generator=GENERATOR)
    tensors = {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales, "e.gate_up_proj_bias": random(3, 70)}
    source = opened(tmp_path, tensors, {"quant_method": "mxfp4"}, dtype)
    assert source.shapes == {"e.gate_up_proj": (3, 128, 70), "e.gate_up_proj_bias": (3, 70)}
    assert torch.equal(read(source, "e.gate_up_proj"), convert_moe_packed_tensors(blocks, scales, dtype=dtype))
    expect_parts(source, "e.gate_up_proj")


def compressed(shape, dtype, format, **arguments):
    """(tensors, quantization_config, what compressed-tensors makes of them) for one module `m`."""
    scheme = QuantizationScheme.model_validate(
        {"targets": ["Linear"], "format": format, "weights": {"type": "int", "num_bits": 4, **arguments}}
    )
    weight = random(*shape).to(dtype)
    scale, zero_point = parameters(weight, scheme.weights)
    state = {"weight": weight, "weight_scale": scale}
    if not scheme.weights.symmetric:
        state["weight_zero_point"] = zero_point
    compressor = BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(state, scheme)
    decoded = compressor.decompress(dict(stored), scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json")}},
    }
    return {f"m.{name}": tensor for name, tensor in stored.items()}, config, decoded


def parameters(weight, arguments):
    """Scale and zero point of each block of a weight, by the library's own rule."""
    rows, columns = weight.shape
    block = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, arguments.group_size or columns),
        "block": tuple(arguments.block_structure or (rows, columns)),
    }[arguments.strategy]
    blocks = weight.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).movedim(1, 2).flatten(2)
    scale, zero_point = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments)
    return (scale.flatten(), zero_point.flatten()) if arguments.strategy == "tensor" else (scale, zero_point)


PACKED = {
    "group": {"strategy": "group", "group_size": 32},
    "group-zero-points": {"strategy": "group", "group_size": 32, "symmetric": False},
    "channel": {"strategy": "channel"},
    "channel-zero-points": {"strategy": "channel", "symmetric": False},
    "tensor": {"strategy": "tensor"},
    "group-8-bits": {"strategy": "group", "group_size": 64, "num_bits": 8},
    "group-8-bits-zero-points": {"strategy": "group", "group_size": 64, "num_bits": 8, "symmetric": False},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", PACKED)
def test_packed_integers_are_decoded_as_compressed_tensors_does(tmp_path, case, dtype):
    tensors, config, decoded = compressed((50, 192), dtype, "pack-quantized", **PACKED[case])
    source = opened(tmp_path, tensors, config, dtype)
    assert source.shapes == {"m.weight": (50, 192)}
    assert torch.equal(read(source, "m.weight"), decoded.to(dtype))
    expect_parts(source, "m.weight")


def test_packed_columns_need_not_fill_a_word(tmp_path):
    tensors, config, decoded = compressed((6, 77), torch.float32, "pack-quantized", strategy="channel")
    source = opened(tmp_path, tensors, config, torch.float32)
    assert torch.equal(read(source, "m.weight"), decoded)
    expect_parts(source, "m.weight")


PLAIN = {
    "float8-channel": ("float-quantized", {"type": "float", "num_bits": 8, "strategy": "channel"}),
    "float8-tensor": ("float-quantized", {"type": "float", "num_bits": 8, "strategy": "tensor"}),
    "float8-block": (
        "float-quantized",
        {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [64, 32]},
    ),
    "int8-channel": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
}


@pytest.mark.parametrize("case", PLAIN)
def test_plain_numbers_are_decoded_as_compressed_tensors_does(tmp_path, case):
    format, arguments = PLAIN[case]
    tensors, config, decoded = compressed((128, 192), torch.bfloat16, format, **arguments)
    assert tensors["m.weight"].element_size() == 1
    source = opened(tmp_path, {**tensors, "m.input_scale": torch.ones(1)}, config)
    assert source.shapes == {"m.weight": (128, 192)}
    assert torch.equal(read(source, "m.weight"), decoded)
    expect_parts(source, "m.weight")


def test_decoding_reads_only_the_bytes_it_needs(tmp_path, monkeypatch):
    from megatron.bridge.conversion.hf import HFWeights

    weight, scale = in_fp8(random(512, 512), (128, 128))
    source = opened(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, FP8)
    read_bytes, original = [], HFWeights.read

    def counting(self, *arguments):
        tensor = original(self, *arguments)
        read_bytes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(HFWeights, "read", counting)
    source.read("a.weight", ((100, 200), (256, 512)))
    assert sum(read_bytes) == 100 * 256 + 2 * 2 * 4


def fp8_tensors():
    weight, scale = in_fp8(random(300, 256), (128, 128))
    return {"a.weight": weight, "a.weight_scale_inv": scale}


def packed_tensors(**arguments):
    tensors, config, _ = compressed((16, 64), torch.float32, "pack-quantized", **{**PACKED["group"], **arguments})
    return tensors, config


def changed(config, **values):
    (name, group), *_ = config["config_groups"].items()
    return {**config, "config_groups": {name: {**group, "weights": {**group["weights"], **values}}}}


@pytest.mark.parametrize(
    ("change", "config", "culprit"),
    [
        (lambda held: held.pop("a.weight_scale_inv"), FP8, r"a\.weight is stored in float8 .*a\.weight_scale_inv"),
        (lambda held: None, {**FP8, "weight_block_size": [64, 128]}, r"a\.weight_scale_inv \[3, 2\] does not fit"),
        (lambda held: None, {**FP8, "weight_block_size": [0, 128]}, "weight_block_size must be two numbers"),
        (lambda held: None, {**FP8, "expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
        (lambda held: None, None, r"in few bits \(a\.weight\)"),
        (lambda held: None, {"quant_method": "gptq"}, "quantised by 'gptq'.*dequantize"),
        (lambda held: None, {"quant_method": "awq"}, "quantised by 'awq'"),
        (lambda held: None, {"load_in_4bit": True, "quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        (lambda held: None, {"quant_method": "mxfp4"}, r"in few bits \(a\.weight\)"),
    ],
)
def test_fp8_that_is_not_as_stated_is_refused(tmp_path, change, config, culprit):
    tensors = fp8_tensors()
    change(tensors)
    with pytest.raises(BridgeError, match=culprit):
        opened(tmp_path, tensors, config)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 8, 3), torch.uint8), ((2, 8, 4, 1), torch.uint8), ((2, 8, 4), torch.int8)]
)
def test_mxfp4_without_fitting_scales_is_refused(tmp_path, shape, dtype):
    tensors = {
        "e.up_blocks": torch.zeros(2, 8, 4, 16, dtype=torch.uint8),
        "e.up_scales": torch.zeros(shape, dtype=dtype),
    }
    with pytest.raises(BridgeError, match=r"e\.up_blocks \[2, 8, 4, 16\] with e\.up_scales"):
        opened(tmp_path, tensors, {"quant_method": "mxfp4"})


def two_widths(config):
    other = changed(config, num_bits=8)["config_groups"]["group_0"]
    return {**config, "config_groups": {**config["config_groups"], "group_1": other}}


@pytest.mark.parametrize(
    ("change", "restate", "culprit"),
    [
        (lambda held: held.pop("m.weight_scale"), lambda config: config, "without m.weight_scale"),
        (lambda held: held.pop("m.weight_shape"), lambda config: config, "without m.weight_shape"),
        (
            lambda held: held.update({"m.weight_g_idx": torch.zeros(64, dtype=torch.int32)}),
            lambda config: config,
            "weight_g_idx",
        ),
        (lambda held: None, lambda config: changed(config, num_bits=3), "integers of 3 bits"),
        (lambda held: None, lambda config: changed(config, num_bits=8), r"cannot hold \[16, 64\] integers of 8 bits"),
        (lambda held: None, lambda config: changed(config, group_size=16), "does not fit"),
        (lambda held: None, lambda config: changed(config, strategy="token"), "scales per 'token'"),
        (lambda held: None, two_widths, "num_bits = 4, 8"),
        (lambda held: None, lambda config: {**config, "format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized'"),
        (lambda held: None, lambda config: {**config, "sparsity_config": {"format": "sparse-24"}}, "sparse-24"),
        (
            lambda held: held.update({"m.weight_shape": torch.tensor([16, 65])}),
            lambda config: config,
            r"cannot hold \[16, 65\]",
        ),
    ],
)
def test_packed_integers_that_are_not_as_stated_are_refused(tmp_path, change, restate, culprit):
    tensors, config = packed_tensors()
    change(tensors)
    with pytest.raises(BridgeError, match=culprit):
        opened(tmp_path, tensors, restate(config))


class Exactly:
    """Equal to a tensor of the same values."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __eq__(self, other):
        return torch.is_tensor(other) and torch.equal(self.tensor, other)

    __hash__ = None


def refused_or_read(folder, tensors, config, name):
    try:
        return read(opened(folder, tensors, config, torch.float32), name)
    except BridgeError as error:
        return "refused" if len(str(error)) > 40 else str(error)


ODD_VALUES = (None, 0, -1, 3.5, "", "group", [], [1], {}, {"a": 1}, True)


@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
def test_odd_configurations_are_refused_by_message_or_harmless(tmp_path, value):
    """Each field with a value of another kind: an error that names what is wrong, or the very weights."""
    tensors, config, reference = compressed((16, 64), torch.float32, "pack-quantized", **PACKED["group"])
    decoded = Exactly(reference)
    variants = [changed(config, **{field: value}) for field in ("num_bits", "strategy", "group_size")]
    variants += [{**config, field: value} for field in ("config_groups", "quant_method", "format", "sparsity_config")]
    variants.append({**config, "config_groups": {"group_0": value}})
    for variant in variants:
        assert refused_or_read(tmp_path, tensors, variant, "m.weight") in ("refused", decoded)
    fp8 = fp8_tensors()
    right = Exactly(read(opened(tmp_path, fp8, FP8, torch.float32), "a.weight"))
    for field in ("quant_method", "weight_block_size"):
        assert refused_or_read(tmp_path, fp8, {**FP8, field: value}, "a.weight") in ("refused", right)


def test_quantisation_stated_for_the_text_model_counts(tmp_path):
    tensors = fp8_tensors()
    opened(tmp_path, tensors, FP8)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": FP8}}))
    assert list(open_weights(HFSource(tmp_path), torch.bfloat16).shapes) == ["a.weight"]
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": "fp8"}))
    with pytest.raises(BridgeError, match="is no table but 'fp8'"):
        open_weights(HFSource(tmp_path), torch.bfloat16)


def test_a_large_weight_is_decoded_in_strips(tmp_path):
    """The rows of several strips, with blocks that do not end where strips do."""
    weight, scale = in_fp8(random(1300, 96), (48, 40))
    source = opened(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, {**FP8, "weight_block_size": [48, 40]})
    expanded = scale.repeat_interleave(48, 0)[:1300].repeat_interleave(40, 1)[:, :96]
    assert torch.equal(read(source, "a.weight"), (weight.float() * expanded).bfloat16())
    assert math.prod(source.shapes["a.weight"]) == 1300 * 96


def test_gpt_oss_in_mxfp4_has_the_names_and_shapes_of_transformers_own_full_precision(tmp_path):
    from transformers import GptOssConfig

    from megatron.bridge.testing import save_random_model

    config = GptOssConfig(
        vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_local_experts=4, head_dim=16
    )
    full = save_random_model(config, tmp_path / "full")
    tensors = {}
    for name, tensor in full.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor
            continue
        experts, inner, outer = tensor.shape
        held = (experts, outer, inner // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*held, 16), dtype=torch.uint8, generator=GENERATOR)
        tensors[f"{name}_scales"] = torch.randint(120, 130, held, dtype=torch.uint8, generator=GENERATOR)
    source = opened(tmp_path / "mxfp4", tensors, {"quant_method": "mxfp4"}, torch.bfloat16)
    assert dict(source.shapes) == {name: tuple(tensor.shape) for name, tensor in full.items()}
