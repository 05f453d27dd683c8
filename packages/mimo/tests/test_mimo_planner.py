"""`mimo plan`: sizes as transformers has them, costs as the planner's, every proposal able to run."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from megatron.bridge.cli.root import cli
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.planner.encoder_shape import EncoderShape, tower_shape
from megatron.bridge.mimo.planner.search import LANGUAGE, MimoQuestion, best, plans
from megatron.bridge.training.planner.hardware import cluster
from megatron.bridge.training.planner.plan import Question, planned
from megatron.bridge.training.planner.shape import ModelShape

SEVEN = ModelShape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    vocab_size=32064,
    seq_length=2048,
    normalization="RMSNorm",
    gated_linear_unit=True,
    add_bias_linear=False,
)
CLIP_LARGE = {
    **{"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
    **{"num_attention_heads": 16, "image_size": 336, "patch_size": 14},
}


def encoder(values: Any = CLIP_LARGE, **changes: Any) -> EncoderShape:
    tower, patch_weights = tower_shape(values, "a test")
    return EncoderShape(tower=tower, patch_weights=patch_weights, hidden_size=4096, **changes)


def asked(gpus: str, batch: int = 64, shape: ModelShape = SEVEN, **encoders: EncoderShape) -> MimoQuestion:
    return MimoQuestion(
        Question(shape=shape, cluster=cluster(gpus), global_batch=batch), encoders or {"images": encoder()}
    )


def test_a_tower_has_the_weights_that_transformers_gives_it() -> None:
    import torch
    import transformers

    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    small |= {"image_size": 28, "patch_size": 7}
    large = {name: value for name, value in CLIP_LARGE.items() if name != "model_type"}
    cases = [
        (transformers.CLIPVisionConfig(**large), "CLIPVisionModel"),
        (transformers.CLIPVisionConfig(**small), "CLIPVisionModel"),
        (transformers.SiglipVisionConfig(**small, vision_use_head=False), "SiglipVisionModel"),
    ]
    for config, name in cases:
        with torch.device("meta"):
            model = getattr(transformers, name)(config)
        # Class token, norms before the layers and biases of patches are left out.
        assert encoder(config.to_dict()).tower_parameters == pytest.approx(model.num_parameters(), rel=0.01)


def test_what_a_configuration_leaves_out_has_the_default_of_its_class() -> None:
    tower, _ = tower_shape({"vision_config": {"model_type": "clip_vision_model", "patch_size": 16}}, "a test")
    assert (tower.hidden_size, tower.num_layers, tower.seq_length) == (768, 12, 14 * 14)
    with pytest.raises(BridgeError, match="gpt2 is no vision tower .* lacks .*image_size"):
        tower_shape({"model_type": "gpt2"}, "gpt2")


def test_on_one_device_it_is_the_plan_of_the_language_model_and_the_encoder_on_top() -> None:
    shape = SEVEN.replace(num_layers=4)
    question = asked("1xH100", 4, shape)
    for each in plans(dataclasses.replace(question, modes=("homogeneous",))):
        alone = planned(question.language, each.layout)
        extra = each.micro_batches * each.pass_seconds["images"]
        assert each.seconds >= alone.time.total + extra
        assert each.seconds == pytest.approx(alone.time.total + extra, rel=0.1)
        assert each.memory[LANGUAGE] == alone.memory.total
        assert each.fullest == pytest.approx(each.memory[LANGUAGE] + each.memory["images"])
    assert not list(plans(dataclasses.replace(question, modes=("heterogeneous",))))


def test_every_proposal_can_run_and_fits() -> None:
    question = asked("16xH100")
    found = best(question, 3)
    assert set(found) == {"homogeneous", "colocated", "heterogeneous"}
    for mode, proposals in found.items():
        assert 1 <= len(proposals) <= 3
        for each in proposals:
            each.placement.finalize(16)
            assert each.mode == mode
            assert each.fullest <= question.room
            samples = each.layout.micro_batch * each.placement.module_parallelisms[LANGUAGE].data_parallel
            assert all(samples % layout.data_parallel == 0 for layout in each.placement.module_parallelisms.values())
            assert samples * each.micro_batches == 64
            assert all(0 < each.busy(name) <= 1 for name in each.pass_seconds)
            assert 0 < each.mfu < 1
        assert [each.seconds for each in proposals] == sorted(each.seconds for each in proposals)


def test_an_encoder_that_is_not_trained_costs_a_third_and_keeps_nothing() -> None:
    modes = ("colocated",)
    (trained,) = best(dataclasses.replace(asked("8xH100"), modes=modes), 1)["colocated"]
    frozen = dataclasses.replace(asked("8xH100", images=encoder(frozen=True)), modes=modes)
    same = next(each for each in plans(frozen) if each.placement == trained.placement and each.layout == trained.layout)
    assert same.pass_seconds["images"] < 0.4 * trained.pass_seconds["images"]
    assert same.memory["images"] < trained.memory["images"] / 2
    assert same.memory[LANGUAGE] == trained.memory[LANGUAGE]


def test_a_pipeline_over_modules_is_as_slow_as_its_slowest_stage() -> None:
    question = dataclasses.replace(asked("16xH100"), modes=("heterogeneous",))
    for each in itertools.islice(plans(question), 200):
        slowest = max(each.pass_seconds.values())
        assert each.seconds >= each.micro_batches * slowest
        assert each.seconds >= sum(each.pass_seconds.values())


def test_long_sequences_are_divided_and_encoders_are_not() -> None:
    question = asked("8xH100", 4, SEVEN.replace(seq_length=32768))
    for mode, proposals in best(question, 2).items():
        for each in proposals:
            each.placement.finalize(8)
            sizes = {name: layout.context_parallel for name, layout in each.placement.module_parallelisms.items()}
            assert sizes[LANGUAGE] == each.layout.context
            assert sizes["images"] == (each.layout.context if mode == "homogeneous" else 1)
        assert any(each.layout.context > 1 for each in proposals)


def test_what_does_not_fit_or_divide_is_refused() -> None:
    big = SEVEN.replace(num_layers=96, hidden_size=12288, ffn_hidden_size=32768, num_attention_heads=96)
    with pytest.raises(BridgeError, match=r"placement fits 8xH100: the smallest, .* takes .* GB per device"):
        best(asked("8xH100", 64, big), 1)
    with pytest.raises(BridgeError, match="no colocated placement on 16xH100 divides a batch of 7 samples"):
        best(dataclasses.replace(asked("16xH100", 7), modes=("colocated",)), 1)


def folders(tmp_path: Path) -> list[str]:
    for name, values in {
        "llm": {
            **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "vocab_size": 32064},
            **{"intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
            **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        },
        "clip": {"model_type": "clip", "vision_config": CLIP_LARGE},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    return ["mimo", "plan", "--llm", str(tmp_path / "llm"), "--encoder", f"images={tmp_path / 'clip'}"]


def test_the_command_proposes_explains_and_writes_experiments(tmp_path: Path) -> None:
    from megatron.bridge.mimo.experiments.reading import read_experiments

    words = [*folders(tmp_path), "--gpus", "16xH100", "--seq", "2048", "--global-batch-size", "64"]
    told = CliRunner().invoke(cli, [*words, "--write", str(tmp_path / "files")])
    assert told.exit_code == 0, told.output
    for mode in ("homogeneous", "colocated", "heterogeneous"):
        assert f"\n{mode}: step " in told.output
    assert "the least time: " in told.output
    assert "% more: " in told.output
    found = read_experiments(sorted((tmp_path / "files").glob("*.yaml")), recipe="a:b", ranks=16)
    assert [each.mode for each in found] == ["colocated", "heterogeneous", "homogeneous"]
    told = CliRunner().invoke(cli, [*words, "--json", "--mode", "colocated", "--top", "2"])
    data = json.loads(told.output)
    assert list(data["plans"]) == ["colocated"]
    assert len(data["plans"]["colocated"]) == 2


def test_the_command_refuses_what_it_cannot_answer(tmp_path: Path) -> None:
    words = folders(tmp_path)
    for more, message in (
        (["--recipe", "a:b"], "name the modules by"),
        (["--encoder", "images"], "not of the form NAME=FOLDER"),
        (["--frozen", "sound"], "--frozen sound: the encoders are images"),
        (["--items", "8"], "more than the 4096 of a sequence"),
    ):
        told = CliRunner().invoke(cli, [*words, "--gpus", "8xH100", *more])
        assert told.exit_code == 1, told.output
        assert message in told.output


def test_a_recipe_is_planned_by_its_provider_and_what_has_unknown_sizes_is_refused() -> None:
    from megatron.bridge.mimo.mimo_recipe import mimo_config
    from megatron.bridge.mimo.planner.asking import _of_encoder

    recipe = "megatron.bridge.recipes.mimo.digits:digits_vlm_config"
    told = CliRunner().invoke(cli, ["mimo", "plan", "--recipe", recipe, "--gpus", "2xH100", "--mode", "colocated"])
    assert told.exit_code == 0, told.output
    assert "colocated: step " in told.output
    (tower,) = mimo_config(recipe).model.encoders.values()
    with pytest.raises(BridgeError, match="'images': the projector 'resampler' changes how many features"):
        _of_encoder("images", dataclasses.replace(tower, projector="resampler"), 64, 1.0)
    with pytest.raises(BridgeError, match="'images': a object says nothing of its sizes"):
        _of_encoder("images", object(), 64, 1.0)
