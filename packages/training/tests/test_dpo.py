"""DPO beside a plain torch loop around transformers (and peft): losses and rewards step by step, at several layouts.

The reference model is a copy there, or the model without its adapter; here it is never held.
"""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge.data import PreferenceDatasetConfig
from megatron.bridge.data.tokenizers import train_bpe_tokenizer
from megatron.bridge.errors import BridgeError
from megatron.bridge.peft import CanonicalLoRA
from megatron.bridge.testing import run_ranks, save_random_model
from megatron.bridge.training import config as c
from megatron.bridge.training import dpo as dpo_module
from megatron.bridge.training import dpo_command
from megatron.bridge.training.dpo import REWARDS, dpo

STEPS, BATCH, BETA, RATE = 4, 6, 0.5, 1e-2
ROWS = [{"prompt": f"{at}? ", "chosen": "yes" * (1 + at % 3), "rejected": "no" * (1 + at % 4)} for at in range(BATCH)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("dpo")
    train_bpe_tokenizer(["a"], 259, folder / "hf")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": 259, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    save_random_model(LlamaConfig(**sizes, **ids, max_position_embeddings=64, dtype="float32"), folder / "hf")
    lists = [{"role": "assistant", "content": text} for text in ("yes", "no")]
    rows = [*ROWS[1:], {"prompt": [{"role": "user", "content": "0? "}], "chosen": lists[:1], "rejected": lists[1:]}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def method() -> CanonicalLoRA:
    return CanonicalLoRA(dim=4, alpha=32, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])


def configured(folder: Path, **model: Any) -> c.ConfigContainer:
    from megatron.bridge import AutoBridge

    provider = AutoBridge.from_hf_pretrained(folder / "hf").to_megatron_provider()
    provider.seq_length = 48
    for name, value in model.items():
        setattr(provider, name, value)
    return c.ConfigContainer(
        model=provider,
        dataset=PreferenceDatasetConfig(
            data_paths=[str(folder / "rows.jsonl")], split="1", prompt_template="plain", sequence_length=48
        ),
        tokenizer=c.TokenizerConfig(tokenizer_model=str(folder / "hf")),
        train=c.TrainingConfig(train_iters=STEPS, global_batch_size=BATCH),
        optimizer=c.OptimizerConfig(optimizer="adam", lr=RATE, min_lr=RATE, weight_decay=0.0, clip_grad=0.0),
        scheduler=c.SchedulerConfig(lr_decay_style="constant"),
        logger=c.LoggerConfig(progress=False),
    )


def in_torch(folder: Path, adapter: Path | None = None) -> list[dict[str, float]]:
    """The same in plain torch, a frozen second model as the reference; or an adapter of peft, and none as it."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    model, frozen = (AutoModelForCausalLM.from_pretrained(folder / "hf") for _ in range(2))
    beneath: Any = nullcontext
    if adapter is not None:
        model = frozen = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
        beneath = model.disable_adapter
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def log_probability(network: Any, prompt: str, answer: str) -> torch.Tensor:
        before, after = (tokenizer(text)["input_ids"] for text in (prompt, answer))
        ids = torch.tensor([[*before, *after, tokenizer.eos_token_id]])
        scores = network(ids).logits[0, :-1].log_softmax(-1)
        return scores.gather(1, ids[0, 1:, None])[len(before) - 1 :].sum()

    told = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss: Any = 0.0
        found: list[tuple[float, ...]] = []
        for row in ROWS:
            better, worse = (log_probability(model, row["prompt"], row[name]) for name in ("chosen", "rejected"))
            with torch.no_grad(), beneath():
                reference = [log_probability(frozen, row["prompt"], row[name]) for name in ("chosen", "rejected")]
            chosen, rejected = BETA * (better - reference[0]), BETA * (worse - reference[1])
            loss = loss - torch.nn.functional.logsigmoid(chosen - rejected) / len(ROWS)
            found.append((chosen.item(), rejected.item(), (chosen - rejected).item(), float(chosen > rejected)))
        loss.backward()
        optimizer.step()
        means = [sum(each) / len(ROWS) for each in zip(*found, strict=True)]
        told.append({"loss": loss.item()} | dict(zip(REWARDS, means, strict=True)))
    return told


LAYOUTS = {
    "TP2 + SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "DP2": {},
}


ADAPTED = {"LoRA": {}, "LoRA, TP2 + SP": LAYOUTS["TP2 + SP"]}


def told(folder: Path, name: str, cfg: c.ConfigContainer) -> list[dict[str, float]]:
    """What a run logs of its steps, by rank 0."""
    cfg.logger.folder = str(folder / "logs" / name)
    dpo(cfg, beta=BETA)
    lines = map(json.loads, (folder / "logs" / name / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def adapted(folder: Path, name: str) -> c.ConfigContainer:
    cfg = configured(folder, **ADAPTED[name])
    cfg.peft = method()
    return cfg


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[dict[str, float]]]:
    def alone() -> dict[str, Any]:
        from megatron.bridge import AutoBridge

        found: dict[str, Any] = {"one rank": told(folder, "one rank", configured(folder))}
        found["LoRA"] = told(folder, "LoRA", adapted(folder, "LoRA"))
        found["resumed"] = []
        for until in (2, STEPS):
            cfg = configured(folder)
            cfg.train.train_iters, cfg.checkpoint.save = until, str(folder / "halves")
            cfg.checkpoint.load = None if until == 2 else str(folder / "halves")
            found["resumed"] += told(folder, f"until {until}", cfg)
        # An evaluation of a split that does not fill a batch.
        cfg = configured(folder)
        cfg.dataset.split = "50,50"
        cfg.train.eval_interval, cfg.train.eval_iters, cfg.train.train_iters = 1, 1, 1
        cfg.logger.folder = str(folder / "logs/evaluated")
        dpo(cfg, beta=BETA)
        # What the adapter of a run begins with, for peft.
        bridge = AutoBridge.from_hf_pretrained(folder / "hf")
        bridge.save_hf_adapter(method()(bridge.to_megatron_model()), folder / "adapter")
        return found

    def together() -> dict[str, Any]:
        found = {name: told(folder, name, configured(folder, **model)) for name, model in LAYOUTS.items()}
        return found | {"LoRA, TP2 + SP": told(folder, "LoRA, TP2 + SP", adapted(folder, "LoRA, TP2 + SP"))}

    return run_ranks(1, alone, timeout=150)[0] | run_ranks(2, together, timeout=150)[0]


@pytest.mark.parametrize("name", ["one rank", *LAYOUTS, "resumed", *ADAPTED])
def test_losses_and_rewards_are_those_of_a_plain_loop(runs: dict[str, Any], folder: Path, name: str) -> None:
    expected = in_torch(folder, folder / "adapter" if name in ADAPTED else None)
    assert expected[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)  # before the first step: log 2
    assert expected[-1]["loss"] < 0.9 * expected[0]["loss"]
    assert expected[-1]["reward_accuracy"] > 0.5
    assert len(runs[name]) == STEPS
    for ours, theirs in zip(runs[name], expected, strict=True):
        assert {key: ours[key] for key in theirs} == pytest.approx(theirs, abs=1e-5)


def test_an_evaluation_counts_real_pairs_only(runs: dict[str, Any], folder: Path) -> None:
    lines = map(json.loads, (folder / "logs/evaluated/metrics.jsonl").read_text().splitlines())
    (valid,) = (line for line in lines if "valid_loss" in line)
    assert 0.0 < valid["valid_loss"] < 0.70
    assert valid["valid_reward_accuracy"] * 3 == pytest.approx(round(valid["valid_reward_accuracy"] * 3))
    difference = valid["valid_chosen_reward"] - valid["valid_rejected_reward"]
    assert valid["valid_reward_margin"] == pytest.approx(difference, abs=1e-6)


def test_the_command_tunes_and_says_the_same_to_its_ranks(folder: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    seen: list[Any] = []
    rows = tmp_path / "rows.jsonl"
    rows.write_text((folder / "rows.jsonl").read_text() + '{"prompt": "and no answer"}\n')
    words = ["--model", folder / "hf", "--data", rows, "--template", "plain", "--beta", "0.5"]
    words += ["--sequence-length", "48", "--run-folder", tmp_path / "run", "--export-adapter", tmp_path / "adapter"]
    words += ["--skip-bad-rows", "1", "peft=canonical_lora", "peft.target_modules=[q_proj,v_proj]"]
    words += [
        "dataset.split=80,20,0",
        "optimizer.lr=1e-2",
        "train.train_iters=2",
        "train.global_batch_size=2",
        "logger.progress=false",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "megatron.bridge.training.finetune_command.start", lambda command, launching: seen.append(command)
        )
        assert CliRunner().invoke(dpo_command.dpo, list(map(str, words)), catch_exceptions=False).exit_code == 0
        again = seen[0].arguments(resume=False)
        assert CliRunner().invoke(dpo_command.dpo, list(again[1:]), catch_exceptions=False).exit_code == 0
    assert seen[0] == seen[1]
    assert again[0] == "dpo"
    with pytest.raises(BridgeError, match=r"rows.jsonl:7: .*dataset.skip_bad_rows=0"):
        dataclasses.replace(seen[0], skip_bad_rows=0).configured()
    run_ranks(1, seen[0], timeout=120)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]


def test_what_cannot_be_preferred_is_refused(folder: Path, make_run: Any, tmp_path: Path) -> None:
    cfg = configured(folder, context_parallel_size=2)
    for arguments, why in (({}, "set model.context_parallel_size=1"), ({"beta": 0}, "beta=0 must be greater")):
        with pytest.raises(BridgeError, match=why):
            dpo(cfg, **arguments)
    cfg.dataset = make_run().dataset
    with pytest.raises(BridgeError, match="GPTDatasetConfig has none"):
        dpo(cfg)
    with pytest.raises(BridgeError, match="there are no weights to tune"):
        dpo(make_run())
    cfg.checkpoint.load = str(tmp_path)
    with pytest.raises(BridgeError, match="not of a DPO run"):
        dpo_module._read(cfg)
    same = tmp_path / "same.jsonl"
    same.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    cfg = configured(folder)
    cfg.dataset.data_paths = [str(same)]
    with pytest.raises(BridgeError, match=r"same.jsonl:1: 'chosen' and 'rejected' are the same"):
        cfg.validate(1)
    cfg.dataset.packing = False
    with pytest.raises(BridgeError, match="packing=false does not go with pairs"):
        cfg.validate(1)
