"""Data of a run: chosen by name, drawn once each, the same after a resume, the same in every evaluation."""

import hashlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron.bridge.data import TextDatasetConfig
from megatron.bridge.data.tokenizers import train_bpe_tokenizer
from megatron.bridge.testing import run_ranks
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.data import batches_per_chunk
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.overrides import apply_overrides, apply_yaml
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.run_config import to_yaml
from megatron.bridge.training.validation import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 300 ids, and a text."""
    root = tmp_path_factory.mktemp("text")
    lines = [f"line {number} of a text that is not long, {number * number % 97}\n" for number in range(400)]
    train_bpe_tokenizer(lines, 300, root / "tokenizer")
    (root / "text.txt").write_text("\n".join(lines))
    return root


class Streams(Callback):
    """A digest of each row of each step's batches."""

    def __init__(self) -> None:
        self.rows: dict[int, list[str]] = defaultdict(list)

    def on_batch(self, run: Any, batch: dict[str, torch.Tensor]) -> None:
        self.rows[run.progress.iteration] += [
            hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in batch["tokens"]
        ]


def test_the_token_stream_after_a_resume_is_that_of_a_run_without_one(
    make_run: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    def work(steps: int, resume: bool, workers: int) -> dict[int, list[str]]:
        cfg = make_run({"vocab_size": 300}, train_iters=steps, save=str(tmp_path / "run"), num_workers=workers)
        if resume:
            cfg.checkpoint.load = cfg.checkpoint.save
        elif steps == 6:
            cfg.checkpoint.save = None
        apply_overrides(cfg, [
            "dataset=text", "dataset.mock=false", f"dataset.data_paths=[{folder / 'text.txt'}]",
            "dataset.document=paragraph", "dataset.dataloader_type=cyclic",
            f"dataset.path_to_cache={tmp_path / 'cache'}", "tokenizer.vocab_size=null",
            f"tokenizer.tokenizer_model={folder / 'tokenizer'}",
        ])  # fmt: skip
        streams = Streams()
        pretrain(cfg, forward_step, [streams])
        return streams.rows

    def together(ranks: int, *args: Any) -> dict[int, list[str]]:
        each = run_ranks(ranks, work, *args, timeout=100)
        return {step: sorted(row for rows in each for row in rows[step]) for step in each[0]}

    whole = together(1, 6, False, 0)
    first = together(2, 3, False, 0)
    rest = together(1, 6, True, 2)
    assert sorted(whole) == list(range(6))
    assert first | rest == whole


def test_every_evaluation_reads_the_same_samples(make_run: Callable[..., Any], tmp_path: Path) -> None:
    class Recorded(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            with (tmp_path / "drawn").open("a") as stream:
                stream.write(f"{index}\n")
            text, ones = torch.arange(17) + index % 100, torch.ones(16)
            return {"tokens": text[:-1], "labels": text[1:], "loss_mask": ones, "position_ids": torch.arange(16)}

    def work() -> None:
        cfg = make_run(train_iters=4, eval_interval=2, eval_iters=3)
        build = cfg.dataset.build_train_valid_test_datasets
        cfg.dataset.build_train_valid_test_datasets = lambda context: (build(context)[0], Recorded(), None)
        pretrain(cfg, forward_step)

    run_ranks(2, work, timeout=60)
    drawn = [int(line) for line in (tmp_path / "drawn").read_text().split()]
    half = len(drawn) // 2
    assert sorted(drawn[:half]) == sorted(drawn[half:]) == list(range(3 * 8))


def test_a_dataset_is_chosen_by_name(make_run: Callable[..., Any], tmp_path: Path) -> None:
    cfg = make_run()
    apply_overrides(cfg, ["dataset=text", "dataset.document=line", "dataset.mock=false"])
    assert type(cfg.dataset) is TextDatasetConfig
    assert (cfg.dataset.sequence_length, cfg.dataset.split, cfg.dataset.document) == (16, "90,10,0", "line")
    (tmp_path / "run.yaml").write_text(to_yaml(cfg))
    again = make_run()
    apply_yaml(again, tmp_path / "run.yaml")
    assert again == cfg

    (tmp_path / "short.yaml").write_text("dataset: text\n")
    third = make_run()
    apply_yaml(third, tmp_path / "short.yaml")
    assert type(third.dataset) is TextDatasetConfig


def test_a_choice_that_is_none_leaves_everything_as_it_was(make_run: Callable[..., Any]) -> None:
    cfg = make_run()
    before = cfg.dataset
    with pytest.raises(ConfigError, match="no dataset is called 'txet'; did you mean 'text'"):
        apply_overrides(cfg, ["dataset=txet"])
    with pytest.raises(ConfigError, match="no field 'jsn_key'; did you mean 'json_key'"):
        apply_overrides(cfg, ["dataset=text", "dataset.jsn_key=body"])
    assert cfg.dataset is before


def test_every_stage_of_a_model_that_sees_images_is_given_the_tokens(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    middle = {"is_pipeline_first_stage": False, "is_pipeline_last_stage": False}
    for name, value in {**middle, "get_data_parallel_rank": 0, "get_data_parallel_world_size": 1}.items():
        monkeypatch.setattr(parallel_state, name, lambda value=value: value)
    cfg, samples = make_run(), [{"tokens": torch.arange(16)}] * 8
    assert batches_per_chunk(cfg, samples, 1, 8) == [None]
    cfg.model.vision = "a tower"
    [batches] = batches_per_chunk(cfg, samples, 1, 8)
    assert batches is not None
    assert next(batches)["tokens"].shape == (1, 16)
