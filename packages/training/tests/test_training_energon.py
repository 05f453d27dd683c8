"""Energon: shards of text train a model, and a resumed run draws what the whole one drew, on each rank."""

import importlib.util
import io
import itertools
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.bridge.data import DatasetBuildContext, EnergonDatasetConfig
from megatron.bridge.data.streamed import LoaderPlace
from megatron.bridge.data.tokenizers.null import NullTokenizer
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import RankFailed, run_ranks
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.overrides import apply_overrides
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.validation import ConfigError

LENGTH = 16


def _ids(document: int) -> list[int]:
    return [(document * 7 + place * 3) % 120 for place in range(5 + document % 61)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 documents, as the ids that a null tokenizer reads, in 5 shards; the last is for validation."""
    energon = pytest.importorskip("megatron.energon.flavors")
    from megatron.energon.epathlib import EPath

    root = tmp_path_factory.mktemp("energon") / "shards"
    root.mkdir()
    for shard in range(5):
        with tarfile.open(root / f"{shard}.tar", "w") as archive:
            for document in range(18 * shard, 18 * shard + 18):
                data = " ".join(map(str, _ids(document))).encode()
                entry = tarfile.TarInfo(f"{document:04}.txt")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    names = [f"{shard}.tar" for shard in range(5)]
    parts = [("train", 0.8), ("val", 0.2)]
    energon.BaseWebdatasetFactory.prepare_dataset(
        EPath(root), names, split_parts_ratio=parts, shuffle_seed=None, workers=1
    )
    about = "sample_type: {__module__: megatron.energon, __class__: TextSample}\nfield_map: {text: txt}\n"
    (root / ".nv-meta" / "dataset.yaml").write_text(about)
    return root


def _context() -> DatasetBuildContext:
    return DatasetBuildContext(train_samples=None, valid_samples=None, tokenizer=NullTokenizer(128))


class TwiceTheEncoder:
    """A user's encoder, found by `module:Class`: every sample twice as long."""

    def __new__(cls, sequence_length: int, tokenizer: Any) -> Any:
        from megatron.bridge.data.datasets.energon_text import TextEncoder

        return TextEncoder(2 * sequence_length, tokenizer)


def test_every_token_of_a_split_is_a_label_once(shards: Path) -> None:
    config = EnergonDatasetConfig(path=str(shards), sequence_length=LENGTH)
    _, valid, test = config.build_train_valid_test_datasets(_context())
    assert test is None
    found: list[tuple[int, int]] = []
    batches = valid.batches(LoaderPlace(micro_batch_size=1, dp_rank=0, dp_size=1))  # type: ignore[union-attr]
    texts = [[*_ids(document), 127] for document in range(72, 90)]
    for _ in range(sum((len(text) + LENGTH - 2) // LENGTH for text in texts)):
        row = {name: value[0] for name, value in next(batches).items()}
        assert row["position_ids"].tolist() == list(range(LENGTH))
        kept = row["loss_mask"] > 0
        found += zip(row["tokens"][kept].tolist(), row["labels"][kept].tolist(), strict=True)
    with pytest.raises(BridgeError, match="holds no further micro-batch"):
        next(batches)
    assert sorted(found) == sorted(pair for text in texts for pair in itertools.pairwise(text))


class Rows(Callback):
    def __init__(self) -> None:
        self.rows: dict[int, list[Any]] = {}

    def on_batch(self, run: Any, batch: Any) -> None:
        self.rows.setdefault(run.progress.iteration, []).append(batch["tokens"].tolist())


def _run(make_run: Callable[..., Any], shards: Path, folder: Path, **settings: Any) -> tuple[dict[int, Any], Any]:
    cfg = make_run(save=str(folder), eval_interval=2, eval_iters=1, **settings)
    apply_overrides(cfg, ["dataset=energon", f"dataset.path={shards}"])
    rows = Rows()
    result = pretrain(cfg, forward_step, [rows])
    return rows.rows, result


def test_a_resumed_run_draws_what_the_whole_one_drew(
    make_run: Callable[..., Any], shards: Path, tmp_path: Path
) -> None:
    def work(**settings: Any) -> Any:
        return _run(make_run, shards, **settings)

    whole = run_ranks(2, lambda: work(folder=tmp_path / "whole", train_iters=4))
    run_ranks(2, lambda: work(folder=tmp_path / "parts", train_iters=2))
    parts = str(tmp_path / "parts")
    rest = run_ranks(2, lambda: work(folder=tmp_path / "parts", train_iters=4, load=parts))
    for (rows, result), (later, resumed) in zip(whole, rest, strict=True):
        assert later == {step: rows[step] for step in (2, 3)}
        assert resumed.losses == {step: result.losses[step] for step in (3, 4)}
        assert resumed.valid_loss == result.valid_loss
    assert whole[0][0] != whole[1][0]  # data-parallel ranks draw different samples
    with pytest.raises(RankFailed, match="position of 2 data-parallel ranks in the data, and there are 1"):
        run_ranks(1, lambda: work(folder=tmp_path / "other", train_iters=4, load=parts))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_leaves_out_what_workers_have_loaded_ahead(workers: int, shards: Path) -> None:
    config = EnergonDatasetConfig(path=str(shards), sequence_length=LENGTH, num_workers=workers)
    train, *_ = config.build_train_valid_test_datasets(_context())
    place = LoaderPlace(micro_batch_size=2, dp_rank=1, dp_size=2)
    begun = train.batches(place)  # type: ignore[union-attr]
    for _ in range(11):
        next(begun)
    resumed = train.batches(place)  # type: ignore[union-attr]
    resumed.load_state_dict(begun.state_dict())
    for _ in range(8):
        assert (next(resumed)["tokens"] == next(begun)["tokens"]).all()


def test_an_encoder_of_ones_own(shards: Path) -> None:
    config = EnergonDatasetConfig(
        path=str(shards), sequence_length=LENGTH, task_encoder=f"{__name__}:{TwiceTheEncoder.__name__}"
    )
    train, *_ = config.build_train_valid_test_datasets(_context())
    batch = next(train.batches(LoaderPlace(micro_batch_size=3, dp_rank=0, dp_size=1)))  # type: ignore[union-attr]
    assert {tuple(value.shape) for value in batch.values()} == {(3, 2 * LENGTH)}
    config.task_encoder = "nowhere:Encoder"
    with pytest.raises(BridgeError, match="'nowhere:Encoder' cannot be made"):
        config.build_train_valid_test_datasets(_context())


def test_what_energon_cannot_open_is_refused(
    shards: Path, make_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "note.txt").write_text("")
    for path, said in ((None, "is not set"), (tmp_path / "x", "does not exist"), (tmp_path, "run `energon prepare"),
                       (tmp_path / "note.txt", "neither a prepared folder nor")):  # fmt: skip
        cfg = make_run()
        apply_overrides(cfg, ["dataset=energon"] + ([] if path is None else [f"dataset.path={path}"]))
        with pytest.raises(ConfigError, match=said):
            cfg.validate(1)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "energon" in name else find(name))
    with pytest.raises(BridgeError, match=r"megatron-bridge-data\[energon\]"):
        EnergonDatasetConfig(path=str(shards), sequence_length=4).validate(_context())


def test_images_are_refused_by_the_forward_step_of_models_without_them() -> None:
    with pytest.raises(BridgeError, match="the batch has modality_inputs, .* megatron.bridge.mimo.mimo_step"):
        forward_step(None, iter([{"modality_inputs": {}}]), None)  # type: ignore[arg-type, dict-item]


def test_options_without_an_encoder_of_ones_own_are_refused(shards: Path) -> None:
    config = EnergonDatasetConfig(path=str(shards), sequence_length=4, task_encoder_options={"a": 1})
    with pytest.raises(BridgeError, match="dataset.task_encoder_options are for a task encoder of one's own"):
        config.validate(_context())
