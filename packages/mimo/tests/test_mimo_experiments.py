"""Experiments: files read strictly, six of them measured, one report over all, looked at as a picture."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.experiments.command import mimo
from megatron.bridge.mimo.experiments.experiment import read_experiment, read_experiments
from megatron.bridge.mimo.experiments.measure import Measurement
from megatron.bridge.mimo.experiments.report import Result, draw, table

RUNTIME = {"base_batch_size": 2, "num_microbatches": 2, "seq_length": 24, "image_tokens": 16, "steps": 2}
# name -> schedule, sizes of the encoder, sizes of the language model
PLACEMENTS: dict[str, tuple[str, dict[str, int], dict[str, int]]] = {
    "a_one": ("homogeneous", {}, {}),
    "b_shared": ("homogeneous", {"data_parallel": 2}, {"data_parallel": 2}),
    "c_fan_in": ("colocated", {"data_parallel": 2}, {"tensor_parallel": 2}),
    "d_fan_out": ("colocated", {"tensor_parallel": 2}, {"data_parallel": 2}),
    "e_apart": ("1f1b", {}, {}),
    "f_stages": ("1f1b", {}, {"pipeline_parallel": 2}),
}


def write(folder: Path, hf: str, names: Any = PLACEMENTS) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        schedule, encoder, language = PLACEMENTS[name]
        modules = {"images": encoder, "language_module": language}
        held = {
            "model": {"hf": hf, "module_parallelisms": modules},
            "runtime": {"pipeline_schedule": schedule, **RUNTIME},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(held), "utf-8")
    return folder


@pytest.fixture
def tiny_llava(tmp_path: Path) -> str:
    from transformers import LlavaConfig

    text = {"model_type": "llama", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48}
    tower = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    LlavaConfig(
        text_config=text | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        vision_config=tower | {"num_attention_heads": 2, "image_size": 28, "patch_size": 7},
        image_token_id=100,
        architectures=["LlavaForConditionalGeneration"],
    ).save_pretrained(tmp_path / "llava")
    return str(tmp_path / "llava")


@pytest.mark.timeout(600)
def test_a_folder_of_six_is_run_and_reported(tmp_path: Path, tiny_llava: str) -> None:
    folder = write(tmp_path / "experiments", tiny_llava)
    outcome = CliRunner().invoke(mimo, ["run", "--experiments-dir", str(folder), "--timeout", "200"])
    assert outcome.exit_code == 0, outcome.output
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert [each["name"] for each in report] == sorted(PLACEMENTS)
    by_name = {each["name"]: each for each in report}
    assert [len(each["ranks"]) for each in report] == [1, 2, 2, 2, 2, 3]
    apart = by_name["f_stages"]["ranks"]
    assert [each["modules"] for each in apart] == [["images"], ["language_module"], ["language_module"]]
    assert by_name["f_stages"]["bubble"] == pytest.approx(2 / 4)
    for each in report:
        for rank in each["ranks"]:
            inside = sum(rank["forward_seconds"].values())
            assert 0 < inside < rank["seconds"] * 2
            assert set(rank["forward_seconds"]) == set(rank["modules"])
            # One rank exchanges the sums of its step with itself; two exchange gradients and features.
            assert rank["exchange_bytes"] > (0 if each["name"] == "a_one" else 10_000)
    text = (folder / "report.md").read_text("utf-8")
    assert all(f"| {name} |" in text for name in PLACEMENTS)
    assert "does most for each rank" in text
    picture = (folder / "report.svg").read_text("utf-8")
    assert picture.count("<g id=") > 100


def test_what_a_file_must_not_say(tmp_path: Path) -> None:
    folder = write(tmp_path, "somewhere", ["c_fan_in"])
    good = yaml.safe_load((folder / "c_fan_in.yaml").read_text("utf-8"))
    assert read_experiment(folder / "c_fan_in.yaml").ranks == 2
    wrong: list[tuple[Any, str]] = [
        ({**good, "runtme": {}}, "unknown key 'runtme'; did you mean 'runtime'"),
        ({"model": good["model"]}, "the section runtime: is missing"),
        ({**good, "runtime": {**good["runtime"], "step": 2}}, "unknown key 'runtime.step'; did you mean 'steps'"),
        ({**good, "runtime": {**good["runtime"], "steps": "two"}}, "runtime.steps='two' is not <class 'int'>"),
        ({**good, "runtime": {**good["runtime"], "pipeline_schedule": "gpipe"}}, "'gpipe' is none of homogeneous, c"),
    ]
    lone = {**good["model"], "module_parallelisms": {"images": {"data_parallel": 3}, "language_module": {}}}
    wrong.append(({**good, "model": lone}, "'language_module' has 1 ranks, and 3 are running|has 1 rank"))
    del good["runtime"]["seq_length"]
    wrong.append((good, "runtime lacks seq_length"))
    for number, (held, message) in enumerate(wrong):
        path = tmp_path / f"wrong{number}.yml"
        path.write_text(yaml.safe_dump(held), "utf-8")
        with pytest.raises(BridgeError, match=message):
            read_experiment(path)


def test_one_file_or_one_folder(tmp_path: Path) -> None:
    for config, folder in ((None, None), (tmp_path, tmp_path)):
        with pytest.raises(BridgeError, match="say what to run"):
            read_experiments(config, folder)
    with pytest.raises(BridgeError, match=r"holds no \*.yaml"):
        read_experiments(None, tmp_path)


def test_the_winner_is_the_one_that_does_most_for_each_rank(tmp_path: Path) -> None:
    folder = write(tmp_path, "somewhere", ["a_one", "b_shared"])
    one, two = read_experiments(None, folder)
    fast = Measurement(["images", "language_module"], 1.0, {"images": 0.2, "language_module": 0.3}, 0.1, 100, 2**20)
    slow = Measurement(["images", "language_module"], 1.5, {"images": 0.2, "language_module": 0.3}, 0.6, 100, 2**20)
    results = [Result(one, [fast]), Result(two, [slow, slow])]
    assert results[0].samples_per_second_and_rank == pytest.approx(4.0)
    assert results[1].samples_per_second_and_rank == pytest.approx(8 / 1.5 / 2)
    assert "a_one does most for each rank, 50% more than b_shared: 10% of its ranks' time" in table(results)
    assert len(draw(results).axes) == 2
