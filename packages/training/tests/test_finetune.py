"""`finetune`, from Hugging Face and Megatron weights: transformers' losses; the best is kept and exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import run_ranks, save_random_model
from megatron.bridge.training import best, finetune, finetune_command, hf_export, samples

LENGTH = 48
WORDS = ("red", "green", "blue", "black", "white")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, and rows that ask for a word backwards."""
    from transformers import LlamaConfig

    from megatron.bridge.data.tokenizers import train_bpe_tokenizer

    folder = tmp_path_factory.mktemp("finetune")
    train_bpe_tokenizer(["a"], 259, folder / "hf")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": 259, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    save_random_model(LlamaConfig(**sizes, **ids, max_position_embeddings=64, dtype="float32"), folder / "hf")
    save_random_model(
        LlamaConfig(**sizes, **ids, max_position_embeddings=64, dtype="float32"), folder / "other", seed=1
    )
    rows = [{"prompt": f"{word} {at % 7}: ", "completion": word[::-1]} for at, word in enumerate(WORDS * 16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
    return folder


def command(folder: Path, name: str, *overrides: str, **changes: Any) -> finetune_command.FinetuneCommand:
    given: dict[str, Any] = {
        "model": str(folder / "hf"),
        "data": (str(folder / "rows.jsonl"),),
        "valid_data": (str(folder / "valid.jsonl"),),
        "dataset_format": "prompt_completion",
        "template": "plain",
        "sequence_length": LENGTH,
        "skip_bad_rows": 0,
        "epochs": 3.0,
        "patience": None,
        "samples": (),
        "export": None,
        "export_adapter": None,
        "trust_remote_code": False,
        "config": None,
        "run_folder": str(folder / name),
        "resume": False,
    }
    quiet = ("logger.progress=false", "optimizer.lr=3e-2", "train.global_batch_size=4")
    quiet += (*(() if name == "planned" else ("train.eval_interval=6", "train.eval_iters=1")), *overrides)
    return finetune_command.FinetuneCommand(**(given | changes), overrides=quiet)


def by_hand(folder: Path) -> Any:
    """A run as a recipe describes it: a provider of its own, which knows nothing of the folder that it starts from."""
    import dataclasses

    from megatron.bridge import AutoBridge
    from megatron.bridge.models import GPTModelProvider
    from megatron.bridge.peft import CanonicalLoRA

    cfg = finetune.finetune_config(
        folder / "hf", [str(folder / "rows.jsonl")], dataset_format="prompt_completion", prompt_template="plain"
    )
    described = AutoBridge.from_hf_pretrained(folder / "hf").to_megatron_provider(load_weights=False)
    fields = (field.name for field in dataclasses.fields(GPTModelProvider) if field.init)
    cfg.model = GPTModelProvider(**{name: getattr(described, name) for name in fields})
    cfg.model.seq_length = cfg.dataset.sequence_length = LENGTH
    cfg.peft = CanonicalLoRA(dim=4, target_modules=["q_proj", "up_proj"])
    cfg.train.train_iters, cfg.train.global_batch_size, cfg.logger.progress = 2, 4, False
    cfg.checkpoint.pretrained_checkpoint = str(folder / "other")
    return cfg


def metrics(root: Path, name: str) -> dict[int, float]:
    lines = map(json.loads, (root / "metrics.jsonl").read_text().splitlines())
    return {line["iteration"]: line[name] for line in lines if name in line}


def work_alone(folder: Path) -> dict[str, Any]:
    """Whole runs, one after another, on one rank."""
    command(folder, "run", samples=("red 0: ", "blue 1: "), export=str(folder / "exported"))()
    # From the weights of its best checkpoint, at a rate that changes nothing: no loss is lower than the first.
    still = ("optimizer.lr=1e-30", "optimizer.min_lr=0", "train.eval_interval=1")
    command(folder, "still", *still, model=str(folder / "run/checkpoints/best"), patience=2)()
    # An adapter, on the weights of a folder that the model was not made from.
    start = ("peft=lora", "peft.lora_rank=4", f"checkpoint.pretrained_checkpoint={folder / 'other'}")
    command(folder, "adapter", *start, export_adapter=str(folder / "for peft"))()
    finetune.finetune(by_hand(folder), callbacks=[hf_export.ExportHF(folder / "by hand", adapter=True)])
    # Stopped after 6 of 18 steps, and gone on with.
    for until in (6, 18):
        short = (f"train.train_iters={until}", "scheduler.lr_decay_iters=18")
        command(folder, "halves", *short, resume=until > 6)()
    sampled = command(folder, "planned", "train.train_samples=30")
    return {"planned": command(folder, "planned").configured().train, "sampled": sampled.configured().train}


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(1, work_alone, folder, timeout=250)[0]
    layout = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
    run_ranks(2, command(folder, "tp2", *layout, samples=("red 0: ",)), timeout=150)
    return found


def loss_in_transformers(model: str | Path, rows: Path, network: Any = None) -> float:
    """Mean cross entropy of the completions' tokens and the end token, computed row by row."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = network or AutoModelForCausalLM.from_pretrained(model)
    total, count = 0.0, 0
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        ids = torch.tensor([[*prompt, *completion, tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        trained = len(completion) + 1
        with torch.no_grad():
            total += float(network(ids, labels=labels).loss) * trained
        count += trained
    return total / count


def test_how_long_to_train_follows_from_the_data(runs: dict[str, Any]) -> None:
    planned = runs["planned"]
    assert (planned.train_iters, planned.eval_interval, planned.eval_iters) == (18, 1, 1)
    sampled = runs["sampled"]
    assert (sampled.train_iters, sampled.train_samples, sampled.total_iters, sampled.eval_interval) == (None, 30, 7, 1)


def test_losses_are_those_of_transformers(runs: dict[str, Any], folder: Path) -> None:
    """The validation loss that the best checkpoint was kept for, from the exported model in plain transformers."""
    valid = metrics(folder / "run", "valid_loss")
    record = json.loads((folder / "run/checkpoints/best/best.json").read_text())
    assert record["loss"] == min(valid.values())
    assert valid[record["iteration"]] == record["loss"]
    assert loss_in_transformers(folder / "exported", folder / "valid.jsonl") == pytest.approx(record["loss"], abs=1e-5)
    assert record["loss"] < 0.5 * loss_in_transformers(folder / "hf", folder / "valid.jsonl")


def test_the_best_adapter_is_read_back_and_given_to_peft(runs: dict[str, Any], folder: Path) -> None:
    """Its loss in peft, around the weights that the run started from, is the one that it was kept for."""
    import peft
    from transformers import AutoModelForCausalLM

    record = json.loads((folder / "adapter/checkpoints/best/best.json").read_text())
    told = json.loads((folder / "for peft/adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(folder / "other")
    network = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "other"), folder / "for peft"
    )
    loss = loss_in_transformers(folder / "hf", folder / "valid.jsonl", network)
    assert loss == pytest.approx(record["loss"], abs=1e-5)
    assert record["loss"] < 0.9 * loss_in_transformers(folder / "hf", folder / "valid.jsonl", network.unload())


def test_a_provider_by_hand_learns_its_hugging_face_names_from_what_it_starts_from(
    runs: dict[str, Any], folder: Path
) -> None:
    told = json.loads((folder / "by hand/adapter_config.json").read_text())
    assert (told["target_modules"], told["base_model_name_or_path"]) == (["q_proj", "up_proj"], str(folder / "other"))


def test_only_the_best_is_kept_beside_the_last(runs: dict[str, Any], folder: Path) -> None:
    record = json.loads((folder / "run/checkpoints/best/best.json").read_text())
    kept = [path.name for path in (folder / "run/checkpoints/best").glob("iter_*")]
    assert kept == [f"iter_{record['iteration']:07}"]


def test_samples_are_what_transformers_generates(runs: dict[str, Any], folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = json.loads((folder / "run/checkpoints/best/best.json").read_text())
    told = [json.loads(line) for line in (folder / "run/samples.jsonl").read_text().splitlines()]
    of_best = {line["prompt"]: line["answer"] for line in told if line["iteration"] == record["iteration"]}
    tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
    network = AutoModelForCausalLM.from_pretrained(folder / "exported")
    assert of_best.keys() == {"red 0: ", "blue 1: "}
    for prompt, answer in of_best.items():
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = network.generate(**inputs, max_new_tokens=LENGTH - inputs["input_ids"].shape[1], do_sample=False)
        assert tokenizer.decode(output[0][inputs["input_ids"].shape[1] :]) == answer


def test_it_stops_early_when_it_gets_no_better(runs: dict[str, Any], folder: Path) -> None:
    valid = metrics(folder / "still", "valid_loss")
    assert list(valid) == [1, 2, 3]  # the first is the best; two that are not lower, and no more
    best_before = json.loads((folder / "run/checkpoints/best/best.json").read_text())["loss"]
    assert valid[1] == pytest.approx(best_before, abs=1e-6)


def test_a_resumed_run_is_one_run(runs: dict[str, Any], folder: Path) -> None:
    whole, halves = (metrics(folder / name, "loss") for name in ("run", "halves"))
    assert halves.keys() == whole.keys()
    assert [halves[at] for at in whole] == pytest.approx(list(whole.values()), abs=1e-6)
    records = [json.loads((folder / name / "checkpoints/best/best.json").read_text()) for name in ("run", "halves")]
    assert records[0]["iteration"] == records[1]["iteration"]


def test_two_ranks_tune_as_one_does(runs: dict[str, Any], folder: Path) -> None:
    for name in ("loss", "valid_loss"):
        one, two = (metrics(folder / run, name) for run in ("run", "tp2"))
        assert list(two.values())[:6] == pytest.approx(list(one.values())[:6], abs=1e-4)
    told = [json.loads(line) for line in (folder / "tp2/samples.jsonl").read_text().splitlines()]
    assert len(told) == len(metrics(folder / "tp2", "valid_loss"))


def test_the_command_says_the_same_to_its_ranks(folder: Path) -> None:
    from click.testing import CliRunner

    given = command(folder, "run", samples=("a b", "c"), export="x", patience=3, trust_remote_code=True)
    seen: list[Any] = []
    original = finetune_command.start
    finetune_command.start = lambda found, launching: seen.append(found)  # type: ignore[assignment]
    try:
        words = given.arguments(resume=True)
        result = CliRunner().invoke(finetune_command.finetune, words[1:], catch_exceptions=False)
    finally:
        finetune_command.start = original
    assert result.exit_code == 0
    assert seen[0].arguments(resume=True) == words


def test_what_cannot_be_tuned_is_refused(make_run: Any, folder: Path) -> None:
    with pytest.raises(BridgeError, match="there are no weights to tune"):
        finetune.finetune(make_run())
    with pytest.raises(BridgeError, match=r"epochs=0 must be greater"):
        finetune.plan_length(make_run(), 0)
    with pytest.raises(BridgeError, match="patience=0"):
        best.KeepBest(0)
    with pytest.raises(BridgeError, match="must be a list of texts"):
        samples.GenerationSamples("one")
    cfg = make_run()
    state = type("Run", (), {"cfg": cfg})()
    with pytest.raises(BridgeError, match=r"set train.eval_interval and checkpoint.save"):
        best.KeepBest().on_train_start(state)
    with pytest.raises(BridgeError, match="exists; choose another"):
        hf_export.ExportHF(folder).on_train_start(state)
    with pytest.raises(BridgeError, match="no adapter to export: peft is not set"):
        hf_export.ExportHF(folder / "new", adapter=True).on_train_start(state)
    with pytest.raises(BridgeError, match="came neither from AutoBridge nor"):
        hf_export.ExportHF(folder / "new").on_train_start(state)
