"""A tiny model and run for this package's tests, and ranks forked from a process that has imported what they need."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge.models import GPTModelProvider
from megatron.bridge.training import pretrain, setup, train  # noqa: F401  forked ranks find them imported
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    GPTDatasetConfig,
    LoggerConfig,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
)

SECTIONS = ("train", "checkpoint", "optimizer", "scheduler", "logger", "dataset", "tokenizer", "ddp", "rng")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, help="how often each set-up of test_training_kills.py is killed")


def tiny_model(**changes: Any) -> GPTModelProvider:
    """4 layers, hidden 32: 50,000 weights."""
    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 128,
        "make_vocab_size_divisible_by": 16,
        "seq_length": 16,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.1,
    }
    return GPTModelProvider(**(values | changes))


def tiny_run(model: dict[str, Any] | None = None, **settings: Any) -> ConfigContainer:
    """A run of `tiny_model` on mock data; `train_iters=3` and the like go to the section that has the field."""
    provider = tiny_model(**(model or {}))
    cfg = ConfigContainer(
        model=provider,
        dataset=GPTDatasetConfig(mock=True, sequence_length=provider.seq_length, split="90,10,0"),
        train=TrainingConfig(train_iters=20, global_batch_size=8, micro_batch_size=1),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4, weight_decay=0.1, clip_grad=1.0),
        scheduler=SchedulerConfig(lr_decay_style="cosine", lr_decay_iters=40, lr_warmup_iters=2),
        tokenizer=TokenizerConfig(vocab_size=provider.vocab_size),
        logger=LoggerConfig(progress=False),
        checkpoint=CheckpointConfig(),
    )
    for name, value in settings.items():
        owners = [section for section in SECTIONS if hasattr(getattr(cfg, section), name)]
        assert owners, name
        for owner in owners:
            setattr(getattr(cfg, owner), name, value)
    return cfg


@pytest.fixture(scope="session")
def make_run() -> Callable[..., ConfigContainer]:
    """`tiny_run`."""
    return tiny_run


@pytest.fixture(scope="session")
def make_model() -> Callable[..., GPTModelProvider]:
    """`tiny_model`."""
    return tiny_model


@pytest.fixture(scope="session")
def initial_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `tiny_model`'s random weights, for runs at different layouts to start from."""
    from megatron.bridge.testing import run_ranks
    from megatron.bridge.training.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("initial")

    def work() -> None:
        cfg = tiny_run(save=str(folder))
        run = setup.setup(cfg)
        save_checkpoint(0, run.model, None, None, cfg)

    run_ranks(1, work, timeout=120)
    return folder
