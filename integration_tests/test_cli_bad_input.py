"""Each bad input through the command line: refused with culprit and remedy, no traceback, nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Outcome
from safetensors.torch import load_file, save_file
from small_models import save_small_llama, save_small_tokenizer

type Cli = Callable[..., Outcome]
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00005.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`: a small Llama in one file; `sharded`: the same in five, with an index."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("originals")
    save_small_tokenizer(root / "hf")
    save_small_llama(root / "hf")
    AutoModelForCausalLM.from_pretrained(root / "hf").save_pretrained(root / "sharded", max_shard_size="100KB")
    assert (root / "sharded" / SHARD).is_file()
    return root


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Path:
    """Copies to spoil, and the command's working folder."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    return tmp_path


def refused(ended: Outcome, *said: str, code: int = 1) -> None:
    assert ended.code == code, f"{ended.out}\n{ended.err}"
    assert "Traceback" not in ended.err + ended.out
    assert "error: " in ended.err.lower()
    for part in said:
        assert part in ended.err, f"{part!r} is not in\n{ended.err}"


def refuses_import(cli: Cli, folder: Path, model: str, *said: str, options: tuple[str, ...] = ()) -> None:
    """`convert import` of `model` says all of it and leaves the folder as it was, hidden files included."""
    before = sorted(folder.rglob("*"))
    refused(cli("convert", "import", model, "checkpoint", *options, folder=folder), *said)
    assert sorted(folder.rglob("*")) == before


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def test_the_originals_convert(cli: Cli, folder: Path) -> None:
    """So that what is refused below is refused for its fault."""
    for model in ("hf", "sharded"):
        assert cli("convert", "import", model, f"checkpoint-{model}", "--tp", "2", folder=folder).code == 0


def test_missing_shard(cli: Cli, folder: Path) -> None:
    (folder / "sharded" / SHARD).unlink()
    refuses_import(cli, folder, "sharded", "lacks 1 of the 5 files", SHARD, "fetch the missing files")


@pytest.mark.parametrize("model", ["sharded", "hf"])
def test_truncated_file(cli: Cli, folder: Path, model: str) -> None:
    file = folder / model / (SHARD if model == "sharded" else "model.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    refuses_import(cli, folder, model, f"{file.relative_to(folder)} is truncated", "fetch or write the file again")


def test_file_cut_within_its_header(cli: Cli, folder: Path) -> None:
    file = folder / "sharded" / SHARD
    file.write_bytes(file.read_bytes()[:20])
    refuses_import(cli, folder, "sharded", str(file.relative_to(folder)))


def test_index_that_names_an_absent_file(cli: Cli, folder: Path) -> None:
    names = json.loads((folder / "sharded" / INDEX).read_text())["weight_map"]
    edit_json(folder / "sharded" / INDEX, weight_map=names | {"model.norm.weight": "model-00009-of-00009.safetensors"})
    refuses_import(cli, folder, "sharded", INDEX, "model-00009-of-00009.safetensors", "fetch the missing files")


def test_index_that_names_an_absent_weight(cli: Cli, folder: Path) -> None:
    names = json.loads((folder / "sharded" / INDEX).read_text())["weight_map"]
    edit_json(folder / "sharded" / INDEX, weight_map=names | {"model.layers.2.mlp.up_proj.weight": SHARD})
    refuses_import(cli, folder, "sharded", "model.layers.2.mlp.up_proj.weight", SHARD)


def test_unknown_architecture(cli: Cli, folder: Path) -> None:
    edit_json(folder / "hf/config.json", architectures=["LlamaForCausaLM"])
    refuses_import(
        cli, folder, "hf", "'LlamaForCausaLM'", "did you mean 'LlamaForCausalLM'", "megatron-bridge plugins --group"
    )


def test_tensor_without_a_rule(cli: Cli, folder: Path) -> None:
    edit_weights(folder / "hf", lambda weights: weights.update({"model.layers.0.mlp.router.weight": torch.ones(3)}))
    refuses_import(cli, folder, "hf", "without a rule", "model.layers.0.mlp.router.weight [3]", "add a WeightRule")


def test_rule_without_a_tensor(cli: Cli, folder: Path) -> None:
    edit_weights(folder / "hf", lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refuses_import(
        cli,
        folder,
        "hf",
        "the checkpoint lacks",
        "model.layers.1.mlp.up_proj.weight",
        "decoder.layers.1.mlp.linear_fc1",
    )


def test_shape_mismatch(cli: Cli, folder: Path) -> None:
    edit_json(folder / "hf/config.json", intermediate_size=96)
    refuses_import(
        cli,
        folder,
        "hf",
        "shapes that disagree",
        "configuration",
        "model.layers.0.mlp.gate_proj.weight [128, 64]",
        "[96, 64]",
    )


@pytest.mark.parametrize("command", ["import", "verify"])
def test_tensor_parallel_size_that_does_not_divide(cli: Cli, folder: Path, command: str) -> None:
    said = "tensor_model_parallel_size=3 does not divide num_attention_heads=4; sizes that do: 1, 2, 4"
    if command == "import":
        refuses_import(cli, folder, "hf", said, options=("--tp", "3"))
    else:
        refused(cli("verify", "hf", "--tp", "3", "--certificate", "certificate.json", folder=folder), said)
        assert not (folder / "certificate.json").exists()


@pytest.mark.parametrize("name", ["checkpoint", "exported"])
def test_unwritable_target(cli: Cli, folder: Path, name: str) -> None:
    """Its parent is a file, which stops a superuser too."""
    assert cli("convert", "import", "hf", "good", folder=folder).code == 0
    (folder / "file").write_text("mine")
    command = ("import", "hf") if name == "checkpoint" else ("export", "good")
    refused(cli("convert", *command, f"file/{name}", folder=folder), f"file/{name}", "cannot")
    assert (folder / "file").read_text() == "mine"


def test_target_that_exists(cli: Cli, folder: Path) -> None:
    assert cli("convert", "import", "hf", "checkpoint", folder=folder).code == 0
    assert cli("convert", "export", "checkpoint", "exported", folder=folder).code == 0
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    refused(cli("convert", "import", "hf", "checkpoint", folder=folder), "checkpoint", "already", "overwrite")
    refused(cli("convert", "export", "checkpoint", "exported", folder=folder), "exported exists", "overwrite")
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == before


def test_wrong_override_keys_are_reported_at_once(cli: Cli, folder: Path) -> None:
    recipe = ("train", "--recipe", "llama32_1b_pretrain_config", "checkpoint.save=run")
    wrong = ("model.tensor_model_paralel_size=2", "train.train_iters=many", "optimiser.lr=1")
    refused(
        cli(*recipe, *wrong, folder=folder),
        "3 problems",
        "'model.tensor_model_paralel_size'",
        "did you mean 'tensor_model_parallel_size'",
        "train.train_iters: expected int",
        "did you mean 'optimizer'",
    )
    assert not (folder / "run").exists()


def test_unknown_recipe(cli: Cli, folder: Path) -> None:
    ended = cli("train", "--recipe", "llama32_1b_pretrain_confg", folder=folder)
    refused(ended, "'llama32_1b_pretrain_confg'", "did you mean 'llama32_1b_pretrain_config'")


def test_corrupt_jsonl_line(cli: Cli, folder: Path) -> None:
    (folder / "bad.jsonl").write_text('{"text": "one"}\n{"text": "two"\n{"text": "three"}\n')
    ended = cli("data", "preprocess", "bad.jsonl", "--tokenizer", "hf", "--output", "data/bad", folder=folder)
    refused(ended, "bad.jsonl:2 is not JSON", "Repair or remove the line")
    assert not list(folder.glob("data/*"))


def test_not_enough_text(cli: Cli, folder: Path) -> None:
    (folder / "short.txt").write_text("too short")
    assert (
        cli("data", "preprocess", "short.txt", "--tokenizer", "hf", "--output", "data/short", folder=folder).code == 0
    )
    values = ("dataset.mock=false", "dataset.data_paths=[data/short]", "model.vocab_size=512", "checkpoint.save=run")
    tokenizer = ("tokenizer.tokenizer_model=hf", "tokenizer.vocab_size=null")
    ended = cli("train", "--recipe", "llama32_1b_pretrain_config", *values, *tokenizer, folder=folder)
    refused(ended, "not enough text", "'data/short' has", "8193 tokens", "lower dataset.sequence_length")
    assert not (folder / "run").exists()


def test_no_text_at_all(cli: Cli, folder: Path) -> None:
    (folder / "empty.txt").write_text("")
    ended = cli("data", "preprocess", "empty.txt", "--tokenizer", "hf", "--output", "data/empty", folder=folder)
    refused(ended, "the input holds no text")
    assert not list(folder.glob("data/*"))


def test_model_that_is_nowhere(cli: Cli, folder: Path) -> None:
    refuses_import(cli, folder, "nowhere", "'nowhere'", "local folder")


RECIPE = ("train", "--recipe", "llama32_1b_pretrain_config")


def test_a_run_that_cannot_be_is_refused_with_all_that_is_wrong(cli: Cli, folder: Path) -> None:
    """Layout, data, folders, checkpoint and secrets at once, on two ranks that are never started."""
    (folder / "file").write_text("mine")
    (folder / "empty").mkdir()
    before = sorted(folder.rglob("*"))
    wrong = (
        "model.tensor_model_parallel_size=3", "dataset.mock=false", "dataset.data_paths=[data/nowhere]",
        "logger.folder=file/logs", "checkpoint.load=empty", "optimizer.lr=-1", "validation.eval_iters=0",
        "logger.options={tracker: {api_key: abc}}", "comm_overlap.overlap_p2p_comm=true",
    )  # fmt: skip
    refused(
        cli(*RECIPE, "--nproc", "2", "--run-folder", "run", *wrong, folder=folder),
        "11 problems",
        "tensor_model_parallel_size=3",
        "needs a multiple of 3 ranks, and there are 2",
        "no data at 'data/nowhere'",
        "logger.folder='file/logs' cannot be written",
        "is not a folder",
        "checkpoint.load",
        "optimizer.lr=-1",
        "train.eval_iters=0 must be greater than 0",
        "logger.options.tracker.api_key is a secret by its name",
        "overlap_p2p_comm=True is for interleaved pipelines",
    )
    assert sorted(folder.rglob("*")) == before


def test_text_that_is_empty_or_absent(cli: Cli, folder: Path) -> None:
    (folder / "empty").mkdir()
    tokenizer = ("tokenizer.tokenizer_model=hf", "tokenizer.vocab_size=null", "model.vocab_size=512")
    for path, said in (("empty", "no file at all"), ("nowhere.txt", "'nowhere.txt' does not exist")):
        text = ("dataset=text", "dataset.mock=false", f"dataset.data_paths=[{path}]")
        refused(cli(*RECIPE, *text, *tokenizer, folder=folder), said)


def test_a_run_folder_in_the_place_of_a_file(cli: Cli, folder: Path) -> None:
    (folder / "file").write_text("mine")
    refused(
        cli(*RECIPE, "--run-folder", "file", folder=folder), "logger.folder='file' cannot be written", "is not a folder"
    )
    assert (folder / "file").read_text() == "mine"
