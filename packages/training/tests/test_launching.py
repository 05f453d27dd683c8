"""Launchers of this machine, and what a run folder holds."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from megatron.bridge.errors import BridgeError
from megatron.bridge.registry import UnknownPlugin
from megatron.bridge.testing import RankFailed
from megatron.bridge.training.cli import train
from megatron.bridge.training.recipe_registry import RECIPES
from megatron.bridge.training.validation import ConfigError

RECIPE = "launching_test_recipe"


class Poisoned(torch.utils.data.Dataset[Any]):
    """Its sample 17, in the third step and on rank 1, cannot be read."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 17:
            raise ValueError("sample 17 is spoilt")
        text = torch.arange(17) + index % 100
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": torch.ones(16), "position_ids": torch.arange(16)}


@pytest.fixture(autouse=True)
def _recipe(make_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def made() -> Any:
        cfg = make_run(train_iters=2)
        if "POISONED" in os.environ:
            cfg.train.train_iters = 4
            cfg.dataset.build_train_valid_test_datasets = lambda context: (Poisoned(), None, None)
        return cfg

    monkeypatch.chdir(tmp_path)
    RECIPES.register(RECIPE, made)
    yield
    RECIPES.unregister(RECIPE)


def _train(*words: str) -> Result:
    return CliRunner().invoke(train, ["--recipe", RECIPE, *words], catch_exceptions=False)


def test_a_run_folder_is_begun_once_and_gone_on_with(tmp_path: Path) -> None:
    assert _train("--nproc", "2", "--run-folder", "run").exit_code == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoints", "logs", "metrics.jsonl", "run_config.yaml", "starts.jsonl", "stopped_by.txt"
    }  # fmt: skip
    with pytest.raises(BridgeError, match="holds a run already; go on with it by --resume"):
        _train("--nproc", "2", "--run-folder", "run", "train.train_iters=3")
    assert _train("--nproc", "2", "--run-folder", "run", "--resume", "train.train_iters=3").exit_code == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2, 3]
    assert (tmp_path / "run" / "stopped_by.txt").read_text() == "train_iters\n"


def test_a_failed_rank_leaves_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISONED", "1")
    with pytest.raises(RankFailed, match="sample 17 is spoilt"):
        _train("--nproc", "2", "--run-folder", "run", "checkpoint.save_interval=1")
    log = (tmp_path / "run" / "logs" / "rank_00001.log").read_text()
    assert "in __getitem__" in log
    assert "ValueError: sample 17 is spoilt" in log
    assert not (tmp_path / "run" / "stopped_by.txt").exists()
    monkeypatch.delenv("POISONED")
    assert _train("--nproc", "2", "--run-folder", "run", "--resume", "train.train_iters=3").exit_code == 0
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert [(each["event"], each["iteration"]) for each in starts] == [("start", 0), ("start", 2), ("end", 3)]


def test_torchrun_is_given_words_that_it_understands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import config_from_args, parse_args

    given: list[str] = []
    monkeypatch.setattr(os, "execv", lambda program, words: given.extend(words))
    assert _train("--launcher", "torchrun", "--nproc", "2", "--run-folder", "run").exit_code == 0
    assert given[:3] == [sys.executable, "-m", "torch.distributed.run"]
    config, _, words = config_from_args(parse_args(given[3:]))
    assert (config.min_nodes, config.nproc_per_node) == (1, 2)
    assert words[-6:] == ["train", "--recipe", RECIPE, "--run-folder", "run", "--resume"]

    meeting = ("--launch", "rdzv_endpoint=host:29400", "--nodes", "2")
    shown = _train("--launcher", "torchrun", "--dry-run", *meeting, "--nproc", "2", "--launch", "node_rank=1")
    config, _, _ = config_from_args(parse_args(shown.output.split()[3:]))
    assert (config.max_nodes, config.rdzv_endpoint, config.rdzv_backend) == (2, "host:29400", "static")
    assert config.rdzv_configs["rank"] == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--launcher", "slrum"), "no launcher is called 'slrum'; did you mean 'slurm'"),
        (("--launch", "thread=2"), "has no field 'thread'; did you mean 'threads'"),
        (("--launch", "threads=two"), "threads: expected int"),
        (("--nodes", "2"), "the launcher 'local' starts ranks on this machine only"),
        (("--launcher", "torchrun", "--nodes", "2"), "rdzv_endpoint=HOST:PORT"),
        (("--resume",), "name that folder"),
        (("--dry-run", "--nproc", "3"), "is not a multiple of train.micro_batch_size"),
    ],
)
def test_what_cannot_be_launched_is_refused(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, UnknownPlugin, BridgeError), match=said):
        _train(*words)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_starts_nothing(tmp_path: Path) -> None:
    done = _train("--dry-run", "--nproc", "2", "--run-folder", "run")
    assert (
        done.output == f"2 ranks forked from this process: megatron-bridge train --recipe {RECIPE} --run-folder run\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_a_launcher_start_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(BridgeError, match="a launcher has started this process"):
        _train("--nproc", "2")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("logger.options={neptune: {api_token: abc}}", "logger.options.neptune.api_token is a secret by its name"),
        ("logger.mlflow_tracking_uri=https://me:pass@host", "logger.mlflow_tracking_uri is an address with a password"),
        ("logger.wandb_exp_name=with-hunter2hunter2", "logger.wandb_exp_name holds the value of a secret of the"),
    ],
)
def test_secrets_are_refused_and_not_repeated(override: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter2hunter2")
    with pytest.raises(ConfigError, match=said) as caught:
        _train("--dry-run", override)
    for secret in ("abc", ":pass", "hunter2"):
        assert secret not in str(caught.value)
