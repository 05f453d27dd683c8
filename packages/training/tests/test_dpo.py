"""DPO beside a plain torch loop around transformers: losses step by step, at several layouts, and across a resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge.data import PreferenceDatasetConfig
from megatron.bridge.data.tokenizers import train_bpe_tokenizer
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import run_ranks, save_random_model
from megatron.bridge.training import config as c
from megatron.bridge.training import dpo as dpo_module
from megatron.bridge.training.dpo import dpo

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


def in_torch(folder: Path) -> list[float]:
    """The same training in plain torch, a frozen second model as the reference."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    model, frozen = (AutoModelForCausalLM.from_pretrained(folder / "hf") for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def log_probability(network: Any, prompt: str, answer: str) -> torch.Tensor:
        before, after = (tokenizer(text)["input_ids"] for text in (prompt, answer))
        ids = torch.tensor([[*before, *after, tokenizer.eos_token_id]])
        scores = network(ids).logits[0, :-1].log_softmax(-1)
        return scores.gather(1, ids[0, 1:, None])[len(before) - 1 :].sum()

    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss: Any = 0.0
        for row in ROWS:
            better, worse = (log_probability(model, row["prompt"], row[name]) for name in ("chosen", "rejected"))
            with torch.no_grad():
                reference = [log_probability(frozen, row["prompt"], row[name]) for name in ("chosen", "rejected")]
            margin = (better - reference[0]) - (worse - reference[1])
            loss = loss - torch.nn.functional.logsigmoid(BETA * margin) / len(ROWS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


LAYOUTS = {
    "TP2 + SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "DP2": {},
}


@pytest.fixture(scope="module")
def losses(folder: Path) -> dict[str, list[float]]:
    def alone() -> dict[str, list[float]]:
        found = {"one rank": list(dpo(configured(folder), beta=BETA).losses.values())}
        halves: list[float] = []
        for until in (2, STEPS):
            cfg = configured(folder)
            cfg.train.train_iters, cfg.checkpoint.save = until, str(folder / "halves")
            cfg.checkpoint.load = None if until == 2 else str(folder / "halves")
            halves += dpo(cfg, beta=BETA).losses.values()
        # An evaluation of a split that does not fill a batch.
        cfg = configured(folder)
        cfg.dataset.split = "50,50"
        cfg.train.eval_interval, cfg.train.eval_iters, cfg.train.train_iters = 1, 1, 1
        evaluated = dpo(cfg, beta=BETA)
        return found | {"resumed": halves, "evaluated": [evaluated.valid_loss or 0.0]}

    def together() -> dict[str, list[float]]:
        return {
            name: list(dpo(configured(folder, **model), beta=BETA).losses.values()) for name, model in LAYOUTS.items()
        }

    return run_ranks(1, alone, timeout=150)[0] | run_ranks(2, together, timeout=150)[1]


@pytest.mark.parametrize("name", ["one rank", *LAYOUTS, "resumed"])
def test_losses_are_those_of_a_plain_loop(losses: dict[str, list[float]], folder: Path, name: str) -> None:
    expected = in_torch(folder)
    assert expected[0] == pytest.approx(0.6931472, abs=1e-6)  # before the first step: log 2
    assert expected[-1] < 0.5 * expected[0]
    assert losses[name] == pytest.approx(expected, abs=1e-5)


def test_an_evaluation_counts_real_pairs_only(losses: dict[str, list[float]]) -> None:
    assert 0.0 < losses["evaluated"][0] < 0.70


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
