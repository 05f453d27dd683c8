"""Vision-language models: transformers' logits of text with images, gradients, bitwise round trips, refusals."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, CLIPImageProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.logits import megatron_logits
from megatron.bridge.conversion.offline import export_checkpoint, import_checkpoint
from megatron.bridge.conversion.verify import relative_difference, verify
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import RankFailed, random_model, run_ranks
from megatron.bridge.testing.families import compare, expect_same_weights, family_case, refuse_without_any_rule

TP, PP, SP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel"
TEXT = {
    **{"vocab_size": 131, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "max_position_embeddings": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
TEXT_OF_QWEN = {name: value for name, value in TEXT.items() if name != "head_dim"}
TOWER = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 7, "num_channels": 3},
}
CLIP, SIGLIP = {"model_type": "clip_vision_model", **TOWER}, {"model_type": "siglip_vision_model", **TOWER}
TILES = [[28, 56], [56, 28], [56, 56]]
PATCHES = {
    **{"depth": 3, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "intermediate_size": 48},
    **{"out_hidden_size": 64, "spatial_merge_size": 2, "temporal_patch_size": 2},
}
QWEN = {
    "text_config": TEXT_OF_QWEN
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
    **{"image_token_id": 100, "video_token_id": 101, "vision_start_token_id": 102, "vision_end_token_id": 103},
}
IMAGE = {"image_token_id": 100}
# case -> (transformers' model type, its configuration)
CASES = {
    "llava": ("llava", {**IMAGE, "text_config": {"model_type": "llama", **TEXT}, "vision_config": CLIP}),
    "llava-tied-qwen3-siglip": (
        "llava",
        {
            **IMAGE,
            "text_config": {"model_type": "qwen3", **TEXT},
            "vision_config": SIGLIP,
            "vision_feature_select_strategy": "full",
            "tie_word_embeddings": True,
        },
    ),
    "llava_next": (
        "llava_next",
        {
            **IMAGE,
            "text_config": {"model_type": "mistral", **TEXT},
            "vision_config": CLIP,
            "image_grid_pinpoints": TILES,
        },
    ),
    "vipllava": (
        "vipllava",
        {
            **IMAGE,
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": CLIP,
            "vision_feature_layers": [-2, -1],
        },
    ),
    "qwen2_vl": (
        "qwen2_vl",
        {**QWEN, "vision_config": PATCHES | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}},
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {**QWEN, "vision_config": PATCHES | {"window_size": 16, "fullatt_block_indexes": [1]}},
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {
            **QWEN,
            "text_config": QWEN["text_config"] | {"head_dim": 16},
            "vision_config": PATCHES | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]},
        },
    ),
    "gemma3": (
        "gemma3",
        {
            **IMAGE,
            "text_config": TEXT | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2},
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
        },
    ),
    "mistral3": (
        "mistral3",
        {
            **IMAGE,
            "text_config": {"model_type": "mistral", **TEXT},
            "vision_config": {"model_type": "pixtral", **TOWER, "image_size": 56, "head_dim": 16},
            "vision_feature_layer": -1,
            "spatial_merge_size": 2,
        },
    ),
    "internvl": (
        "internvl",
        {
            **IMAGE,
            "text_config": {"model_type": "qwen2", **TEXT_OF_QWEN},
            "vision_config": TOWER | {"image_size": [28, 28], "patch_size": [7, 7]},
        },
    ),
    "aya_vision": (
        "aya_vision",
        {**IMAGE, "text_config": {"model_type": "cohere2", **TEXT}, "vision_config": SIGLIP},
    ),
    "llava_onevision": (
        "llava_onevision",
        {
            **IMAGE,
            "text_config": {"model_type": "qwen2", **TEXT_OF_QWEN},
            "vision_config": SIGLIP,
            "vision_feature_select_strategy": "full",
            "image_grid_pinpoints": TILES,
        },
    ),
    "idefics3": ("idefics3", {**IMAGE, "text_config": {"model_type": "llama", **TEXT}, "vision_config": TOWER}),
    "smolvlm": ("smolvlm", {**IMAGE, "text_config": {"model_type": "llama", **TEXT}, "vision_config": TOWER}),
    "glm4v": (
        "glm4v",
        {
            **{**QWEN, "image_start_token_id": 102, "image_end_token_id": 103},
            "text_config": TEXT_OF_QWEN
            | {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
            "vision_config": PATCHES | {"image_size": 16},
        },
    ),
}
CONFIGS = {name: CONFIG_MAPPING[kind](**values, dtype="float32") for name, (kind, values) in CASES.items()}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("vision")
    return {name: family_case(config, root / name, name) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2"])
def test_logits_of_images_and_text_and_round_trip(cases, layout):
    assert compare(list(cases.values()), layout).keys() == CASES.keys()


@pytest.mark.parametrize("layout", ["vpp2", "tp4", "tp2pp2"])
def test_images_at_further_layouts(cases, layout):
    compare([cases[name] for name in ("llava_next", "qwen2_5_vl", "gemma3")], layout)


def test_the_comparison_sees_the_images(cases):
    for name, case in cases.items():
        reference = random_model(CONFIGS[name])
        other = dict(case.inputs[0])
        other["pixel_values"] = other["pixel_values"] + 1
        with torch.no_grad():
            changed = reference(case.tokens[:1], **other).logits
        assert relative_difference(changed, case.logits[:1]) > 1e-3, name


@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl", "gemma3"])
def test_without_any_one_rule_nothing_is_converted(cases, name):
    assert run_ranks(1, refuse_without_any_rule, cases[name])[0] > 10


def text_alone(cases, layout):
    found = {}
    for name, case in cases.items():
        tokens = case.tokens.masked_fill((case.tokens >= 100) & (case.tokens < 104), 7)
        with torch.no_grad():
            expected = random_model(CONFIGS[name])(tokens).logits
        model = AutoBridge.from_hf_pretrained(case.folder).to_megatron_model(**layout, layer_spec="torch")
        found[name] = relative_difference(megatron_logits(model, tokens)[..., : expected.shape[-1]], expected)
    return found


def test_text_without_images(cases):
    for found in run_ranks(2, text_alone, cases, {TP: 2}):
        assert max(found.values()) < 1e-5, found


def with_video(name, case):
    """A row of text, an image and a video of two frames of 4 tokens each, which Qwen3-VL keeps apart by text."""
    frame, generator = [101] * 4, torch.Generator().manual_seed(1)
    video = [*frame, 9, *frame] if name == "qwen3_vl" else [*frame, *frame]
    tokens = torch.tensor([[5, *[100] * 6, 6, 7, *video, 8, 4]])
    inputs = {
        **{key: value for key, value in case.inputs[0].items() if not key.endswith("type_ids")},
        "pixel_values_videos": torch.randn(2 * 4 * 4, 96, generator=generator),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }
    if name == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([0.5])
    return tokens, inputs


def logits_with_video(cases, rows):
    found = {}
    for name, (tokens, inputs) in rows.items():
        model = AutoBridge.from_hf_pretrained(cases[name].folder).to_megatron_model(**{PP: 2}, layer_spec="torch")
        found[name] = megatron_logits(model, tokens, [inputs])
    return found


def test_videos_beside_images(cases):
    rows = {name: with_video(name, cases[name]) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")}
    found = run_ranks(2, logits_with_video, cases, rows)[0]
    for name, (tokens, inputs) in rows.items():
        types = (tokens == 100).long() + 2 * (tokens == 101).long()
        with torch.no_grad():
            expected = random_model(CONFIGS[name])(tokens, mm_token_type_ids=types, **inputs).logits
        assert relative_difference(found[name][..., :131], expected) < 1e-5, name


def reference_gradients(config, case):
    model = random_model(config)
    logits = torch.cat(
        [model(row, **inputs).logits for row, inputs in zip(case.tokens.split(1), case.inputs, strict=True)]
    )
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), case.tokens[:, 1:].flatten()).backward()
    return {
        name.removeprefix("model."): value.grad for name, value in model.named_parameters() if value.grad is not None
    }


def gradients(case, layout):
    """In one rank: the tower's gradients of the mean loss, one row after another."""
    bridge = AutoBridge.from_hf_pretrained(case.folder)
    (model,) = bridge.to_megatron_model(**layout, layer_spec="torch")
    model.train()
    count = case.tokens[:, 1:].numel()
    for row, inputs in zip(case.tokens.split(1), case.inputs, strict=True):
        positions = torch.arange(row.shape[1])[None]
        losses = model(row, positions, None, labels=row.roll(-1, 1), **inputs)
        (losses[:, :-1].sum() / count).backward()
    return {name: value.grad for name, value in model.vision.named_parameters() if value.grad is not None}


@pytest.mark.parametrize(("name", "sequence_parallel"), [("llava_next", True), ("qwen3_vl", True), ("gemma3", False)])
def test_the_tower_is_trained_as_transformers_trains_it(cases, name, sequence_parallel):
    case = cases[name]
    expected = reference_gradients(CONFIGS[name], case)
    ranks = run_ranks(2, gradients, case, {TP: 2, SP: sequence_parallel})
    assert len(ranks[0]) > 30
    for key, gradient in ranks[0].items():
        # What transformers leaves without a gradient (layers behind the one that is looked at) has one of zero.
        reference = expected.pop(key, torch.zeros(()))
        assert (gradient - reference).abs().max() <= 1e-4 * max(reference.abs().max(), 1e-4), key
        assert torch.equal(gradient, ranks[1][key]), key
    assert not [key for key in expected if not key.startswith(("language_model.", "lm_head."))]


def random_towers(folder):
    model = AutoBridge.from_hf_pretrained(folder).to_megatron_model(load_weights=False, **{TP: 2})
    return dict(model[0].vision.named_parameters())


def test_random_towers_are_alike_on_tensor_parallel_ranks(cases):
    first, second = run_ranks(2, random_towers, cases["qwen2_5_vl"].folder)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert max(value.std() for value in first.values()) > 0.01


def steps_without_images(case):
    (model,) = AutoBridge.from_hf_pretrained(case.folder).to_megatron_model(layer_spec="torch")
    model.train()
    tokens = torch.arange(8)[None]
    model(tokens, tokens, None, labels=tokens).sum().backward()
    return [parameter.grad for parameter in model.vision.parameters()]


def test_a_batch_of_text_gives_the_tower_gradients_of_zero(cases):
    # Data-parallel ranks with images would wait for them.
    assert all(gradient.eq(0).all() for gradient in run_ranks(1, steps_without_images, cases["qwen3_vl"])[0])


# --- files


def export_older(folder, state):
    """In one rank: exports of a folder with older names, and of a model filled from transformers' own state dict."""
    bridge = AutoBridge.from_hf_pretrained(folder)
    exported = dict(bridge.export_hf_weights(bridge.to_megatron_model()))
    model = bridge.to_megatron_model(load_weights=False)
    bridge.load_hf_weights(model, state)
    return exported, dict(bridge.export_hf_weights(model))


def test_names_are_written_as_the_files_spell_them(cases, tmp_path):
    case = cases["llava"]
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in case.weights.items()}
    save_file(older, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(case.folder / "config.json", tmp_path)
    state = random_model(CONFIGS["llava"]).state_dict()
    assert state.keys().isdisjoint(older)
    for exported in run_ranks(1, export_older, tmp_path, state)[0]:
        expect_same_weights(dataclasses.replace(case, weights=older), iter(exported.items()))


def save_and_reload(case, root):
    bridge = AutoBridge.from_hf_pretrained(case.folder)
    bridge.save_megatron_model(bridge.to_megatron_model(**{TP: 2}), root / "megatron")
    model = bridge.load_megatron_model(root / "megatron", **{TP: 2})
    bridge.save_hf_pretrained(model, root / "hf")
    return verify(root / "hf", layer_spec="torch", **{TP: 2}).to_json()


def test_a_folder_with_its_processor_survives_a_megatron_checkpoint(cases, tmp_path):
    case = cases["llava"]
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(case.folder)
    (certificate, _) = run_ranks(2, save_and_reload, case, tmp_path)
    assert certificate["passed"]
    assert certificate["weights_compared"] == len(case.weights)
    written = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"preprocessor_config.json", "config.json", "model.safetensors"} <= written
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        logits = model(case.tokens[:1], **case.inputs[0]).logits
    assert torch.equal(logits, case.logits[:1])


def load_and_compare(cases, root):
    found = {}
    for name, case in cases.items():
        bridge = AutoBridge.from_megatron_checkpoint(root / name)
        model = bridge.load_megatron_model(root / name, **{TP: 2}, layer_spec="torch")
        expect_same_weights(case, bridge.export_hf_weights(model))
        found[name] = relative_difference(megatron_logits(model, case.tokens, case.inputs)[..., :131], case.logits)
    return found


def test_offline_conversion_in_both_directions(cases, tmp_path):
    chosen = {name: cases[name] for name in ("llava_next", "qwen3_vl", "gemma3")}
    for name, case in chosen.items():
        import_checkpoint(case.folder, tmp_path / name)
        export_checkpoint(tmp_path / name, tmp_path / f"{name}-hf")
        expect_same_weights(case, iter(load_file(tmp_path / f"{name}-hf/model.safetensors").items()))
    assert max(run_ranks(2, load_and_compare, chosen, tmp_path)[0].values()) < 1e-5


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("vision_config", "num_hidden_layers", 4, r"vision_tower.encoder.layers.3.* is missing"),
        ("vision_config", "num_hidden_layers", 2, r"layers.2.*: the configuration's has no such weight"),
        ("vision_config", "intermediate_size", 40, r"fc1.weight \[48, 32\] .*: the configuration's is \[40, 32\]"),
        ("text_config", "num_hidden_layers", 5, r"layers without weights: \[4\]"),
    ],
)
def test_a_tower_of_another_configuration_is_refused_offline(cases, tmp_path, part, field, value, message):
    config = json.loads((cases["llava"].folder / "config.json").read_text())
    config[part][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(cases["llava"].folder / "model.safetensors", tmp_path)
    with pytest.raises(BridgeError, match=message):
        import_checkpoint(tmp_path, tmp_path / "megatron")


def test_bf16_towers_compute_their_frequencies_in_fp32(cases, tmp_path):
    AutoModelForImageTextToText.from_pretrained(cases["qwen2_5_vl"].folder).bfloat16().save_pretrained(tmp_path)

    def check():
        model = AutoBridge.from_hf_pretrained(tmp_path).to_megatron_model()
        tower = model[0].module.vision
        kinds = {tower.visual.rotary_pos_emb.inv_freq.dtype, tower.visual.patch_embed.proj.weight.dtype}
        return kinds, verify(tmp_path, model).to_json()

    kinds, certificate = run_ranks(1, check)[0]
    assert kinds == {torch.float32, torch.bfloat16}
    assert certificate["passed"]


def test_configurations_without_a_part_for_the_text(cases, tmp_path):
    """As transformers before version 5 wrote Qwen2.5-VL's."""
    case = cases["qwen2_5_vl"]
    values = json.loads((case.folder / "config.json").read_text())
    text = values.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    shutil.copy(case.folder / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**text, **values}))
    older = dataclasses.replace(case, folder=tmp_path)
    assert compare([older], "single")[case.name] < 1e-5
    changes = AutoBridge.from_hf_pretrained(tmp_path).config_json(**{"text_config.vocab_size": 140})
    assert changes["vocab_size"] == 140
    assert "text_config" not in changes


def shortened(folder):
    config = CONFIG_MAPPING["llava"](**CASES["llava"][1], architectures=["LlavaForConditionalGeneration"])
    bridge = AutoBridge.from_hf_config(config)
    provider = bridge.to_megatron_provider(dtype=torch.float32)
    provider.num_layers = 2
    bridge.save_hf_pretrained(provider.provide_distributed_model(wrap_with_ddp=False), folder)


def test_a_changed_language_model_is_told_in_the_text_config(tmp_path):
    run_ranks(1, shortened, tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["text_config"]["num_hidden_layers"] == 2
    assert len(AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").model.language_model.layers) == 2


# --- refusals


def forward(case, tokens, inputs):
    (model,) = AutoBridge.from_hf_pretrained(case.folder).to_megatron_model(layer_spec="torch")
    return model(tokens, torch.arange(tokens.shape[1])[None], None, **inputs)


@pytest.mark.parametrize(
    ("row", "images", "message"),
    [
        (1, 0, r"sample 0 has 32 image tokens \(id 100\), and its images have 16 features"),
        (0, 1, r"1 images belong to no sample"),
        (0, None, r"sample 0 has 16 image tokens \(id 100\), and its images have 0 features"),
    ],
)
def test_images_that_do_not_fit_the_tokens_are_refused(cases, row, images, message):
    case = cases["llava"]
    inputs = {} if images is None else case.inputs[images]
    with pytest.raises(RankFailed, match=message):
        run_ranks(1, forward, case, case.tokens[row : row + 1], inputs)


def test_inputs_that_disagree_or_are_unknown_are_refused(cases):
    case = cases["gemma3"]
    inputs = dict(case.inputs[0])
    other = inputs | {"token_type_ids": torch.zeros_like(inputs["token_type_ids"])}
    with pytest.raises(RankFailed, match="token_type_ids disagrees with the tokens"):
        run_ranks(1, forward, case, case.tokens[:1], other)
    with pytest.raises(RankFailed, match=r"takes no input 'pixel_value'; did you mean 'pixel_values'"):
        run_ranks(1, forward, case, case.tokens[:1], {"pixel_value": inputs["pixel_values"]})


def build(folder, fields, layer_spec="torch"):
    AutoBridge.from_hf_pretrained(folder).to_megatron_model(layer_spec=layer_spec, **fields)


def test_layouts_and_specs_that_cannot_do_it_are_refused(cases):
    with pytest.raises(RankFailed, match="context_parallel_size=2: images are put among the embeddings"):
        run_ranks(2, build, cases["llava"].folder, {"context_parallel_size": 2})
    with pytest.raises(RankFailed, match="first 2 layers take features of images, and the first pipeline stage"):
        run_ranks(4, build, cases["qwen3_vl"].folder, {PP: 4})
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    with pytest.raises(RankFailed, match="recompute_granularity='full' would lose the gradients"):
        run_ranks(1, build, cases["qwen3_vl"].folder, recompute)
    with pytest.raises(RankFailed, match="use layer_spec='torch'"):
        run_ranks(1, build, cases["gemma3"].folder, {}, "local")


def test_a_language_model_of_no_family_is_refused():
    text = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CONFIG_MAPPING["llava"](**{**CASES["llava"][1], "text_config": text})
    config.architectures = ["LlavaForConditionalGeneration"]
    with pytest.raises(BridgeError, match="no family is offered for a language model of type 'bert'"):
        AutoBridge.from_hf_config(config)
