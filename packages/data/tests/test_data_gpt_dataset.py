"""The GPT datasets: Megatron-Core's samples of our files, alone and on several ranks, and what is refused before."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.bridge.data import (
    DatasetBuildContext,
    DatasetProvider,
    GPTDatasetConfig,
    MockGPTDatasetConfig,
    TokenizerConfig,
    build_tokenizer,
)
from megatron.bridge.data.preprocess import preprocess_corpus
from megatron.bridge.data.provider import DATASETS
from megatron.bridge.data.tokenizers import Tokenizer
from megatron.bridge.errors import BridgeError

LENGTH = 64
DOCUMENTS_IN_TRAIN = 0.8


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(tokenizer_model=str(tokenizer_folder)))


@pytest.fixture
def prefix(corpus_prefix: str, tmp_path: Path) -> str:
    """A copy that a test may change, with its cache beside it."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(corpus_prefix + suffix, tmp_path / f"help{suffix}")
    return str(tmp_path / "help")


def _config(*prefixes: str, split: str = "80,20,0", **more: Any) -> GPTDatasetConfig:
    return GPTDatasetConfig(data_paths=list(prefixes), split=split, sequence_length=LENGTH, **more)


def _context(tokenizer: Tokenizer | None, train: int | None = 100, valid: int | None = 20) -> DatasetBuildContext:
    return DatasetBuildContext(train_samples=train, valid_samples=valid, tokenizer=tokenizer)


def _rows(dataset: object, count: int) -> list[list[int]]:
    return [dataset[at]["tokens"].tolist() for at in range(count)]  # type: ignore[index]


def _documents(prefix: str) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return [document.tolist() for document in IndexedDataset(prefix)]


def _windows(ids: list[int]) -> set[tuple[int, ...]]:
    return {tuple(ids[at : at + 8]) for at in range(len(ids) - 7)}


def test_samples_are_the_text_of_their_split(prefix: str, tokenizer: Tokenizer) -> None:
    train, valid, test = _config(prefix).build_train_valid_test_datasets(_context(tokenizer))
    assert test is None
    documents = _documents(prefix)
    edge = round(DOCUMENTS_IN_TRAIN * len(documents))
    for dataset, own in ((train, documents[:edge]), (valid, documents[edge:])):
        text = set().union(*map(_windows, own))
        for sample in (dataset[at] for at in range(20)):  # type: ignore[index]
            tokens, labels = sample["tokens"].tolist(), sample["labels"].tolist()
            assert len(tokens) == LENGTH
            assert labels[:-1] == tokens[1:]
            assert sample["position_ids"].tolist() == list(range(LENGTH))
            assert sample["loss_mask"].tolist() == [1.0] * LENGTH
            # Windows that do not cross the end of a document are found in the documents of this split.
            inside = [window for window in _windows(tokens) if tokenizer.eod not in window[:-1]]
            assert inside
            assert all(window in text for window in inside)


def test_one_pass_holds_every_token_once(prefix: str, tokenizer: Tokenizer) -> None:
    context = DatasetBuildContext(train_samples=None, tokenizer=tokenizer)
    train, valid, _ = _config(prefix, split="1,0,0").build_train_valid_test_datasets(context)
    assert valid is None
    ids = [token for document in _documents(prefix) for token in document]
    assert len(train) == (len(ids) - 1) // LENGTH  # type: ignore[arg-type]
    seen = np.bincount(np.concatenate(_rows(train, len(train))), minlength=600)  # type: ignore[arg-type]
    assert (seen <= np.bincount(ids, minlength=600)).all()
    assert seen.sum() > len(ids) - 2 * LENGTH


def test_more_samples_than_text_repeat_it(prefix: str, tokenizer: Tokenizer) -> None:
    train, *_ = _config(prefix).build_train_valid_test_datasets(_context(tokenizer, train=20_000, valid=0))
    assert len(train) >= 20_000  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_order_and_another_one_another(prefix: str, tokenizer: Tokenizer) -> None:
    def build(**more: Any) -> list[list[int]]:
        train, *_ = _config(prefix, **more).build_train_valid_test_datasets(_context(tokenizer))
        return _rows(train, 50)

    first = build()
    assert build() == first, "from the cache"
    assert build(path_to_cache=str(Path(prefix).parent / "elsewhere")) == first, "built anew"
    assert build(random_seed=7) != first


def test_validation_does_not_change_the_training_order(prefix: str, tokenizer: Tokenizer) -> None:
    with_valid, *_ = _config(prefix).build_train_valid_test_datasets(_context(tokenizer))
    alone, nothing, _ = _config(prefix).build_train_valid_test_datasets(_context(tokenizer, valid=0))
    assert nothing is None
    assert _rows(alone, 50) == _rows(with_valid, 50)
    cached = list((Path(prefix).parent / "cache").rglob("*train-sample_index.npy"))
    assert len(cached) == 1, "built once for both"


def test_data_made_anew_are_not_read_with_old_indices(
    tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer
) -> None:
    source, prefix = tmp_path / "a.txt", str(tmp_path / "a")
    for text in ("one two three. " * 400, "x" * 3 + "four five six! " * 400):
        source.write_text(text)
        preprocess_corpus([source], prefix, tokenizer_folder, overwrite=True)
        train, *_ = _config(prefix, split="1").build_train_valid_test_datasets(_context(tokenizer, 10, 0))
        everything = _windows(_documents(prefix)[0])
        assert all(_windows(row) <= everything for row in _rows(train, 5) if tokenizer.eod not in row)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_blends(prefix: str, tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "z.txt").write_text("zz " * 5000)
    preprocess_corpus([tmp_path / "z.txt"], tmp_path / "z", tokenizer_folder)
    text = set().union(*map(_windows, _documents(prefix)))

    def share_of_help(*data_paths: str, samples: int = 400) -> float:
        context = _context(tokenizer, samples, 0)
        train, *_ = _config(*data_paths, split="1").build_train_valid_test_datasets(context)
        assert len(train) >= samples  # type: ignore[arg-type]
        rows = _rows(train, samples)
        return sum(any(window in text for window in _windows(row)) for row in rows) / samples

    other = str(tmp_path / "z")
    assert share_of_help("0.25", prefix, "0.75", other) == pytest.approx(0.25, abs=0.03)
    sizes = [sum(map(len, _documents(path))) for path in (prefix, other)]
    by_size = sizes[0] / sum(sizes)
    assert share_of_help(prefix, other) == pytest.approx(by_size, abs=0.03)
    beyond_one_pass = sum(sizes) // LENGTH + 500
    assert share_of_help(prefix, other, samples=beyond_one_pass) == pytest.approx(by_size, abs=0.03)


def test_paths_per_split(prefix: str, tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "z.txt").write_text("zz " * 5000)
    preprocess_corpus([tmp_path / "z.txt"], tmp_path / "z", tokenizer_folder)
    config = GPTDatasetConfig(train_data_paths=[prefix], valid_data_paths=[str(tmp_path / "z")], sequence_length=LENGTH)
    context = DatasetBuildContext(train_samples=10, valid_samples=10, test_samples=10, tokenizer=tokenizer)
    train, valid, test = config.build_train_valid_test_datasets(context)
    assert test is None
    assert set(_rows(valid, 1)[0]) <= set(_documents(str(tmp_path / "z"))[0])
    assert not set(_rows(train, 1)[0]) <= set(_documents(str(tmp_path / "z"))[0])


def test_document_boundaries_reach_the_masks(tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "lines.txt").write_text("one two three four five\n" * 200)
    preprocess_corpus([tmp_path / "lines.txt"], tmp_path / "l", tokenizer_folder, document="line")
    config = _config(
        str(tmp_path / "l"), split="1", reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True
    )
    train, *_ = config.build_train_valid_test_datasets(_context(tokenizer, 10, 0))
    sample = train[0]  # type: ignore[index]
    ends = [at for at, token in enumerate(sample["tokens"].tolist()) if token == tokenizer.eod]
    assert len(ends) > 1
    starts = [0, *(end + 1 for end in ends)]
    for at in range(LENGTH):
        start = max(first for first in starts if first <= at)
        assert sample["position_ids"][at] == at - start
        visible = ~sample["attention_mask"][0, at]
        assert visible.nonzero().flatten().tolist() == list(range(start, at + 1))
        assert sample["loss_mask"][at] == (0.0 if at in ends else 1.0)


@pytest.mark.parametrize("config", [GPTDatasetConfig(mock=True), MockGPTDatasetConfig()])
def test_mock_data_need_no_files(config: GPTDatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config.sequence_length = 32
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=50))
    train, valid, test = config.build_train_valid_test_datasets(_context(tokenizer))
    assert test is None
    assert len(train) >= 100  # type: ignore[arg-type]
    assert len(valid) >= 20  # type: ignore[arg-type]
    assert all(0 <= token < 50 for row in _rows(train, 100) for token in row)
    assert list(tmp_path.iterdir()) == []


def test_the_registry_offers_both(tokenizer: Tokenizer) -> None:
    assert DATASETS["gpt"] is GPTDatasetConfig
    assert DATASETS["mock"] is MockGPTDatasetConfig


def test_a_provider_of_ones_own_may_have_fields_without_defaults() -> None:
    @dataclass
    class Mine(DatasetProvider):
        data_path: str

        def build_train_valid_test_datasets(self, context: DatasetBuildContext):  # type: ignore[no-untyped-def]
            return [self.data_path] * (context.train_samples or 0), None, None

    train, *_ = Mine("x").build_train_valid_test_datasets(DatasetBuildContext(train_samples=2))
    assert train == ["x", "x"]
    with pytest.raises(BridgeError, match="num_workers=-1"):
        Mine("x", num_workers=-1).validate(DatasetBuildContext())


def _refusal(config: GPTDatasetConfig, context: DatasetBuildContext) -> str:
    """Validating and building refuse alike."""
    with pytest.raises(BridgeError) as validating:
        config.validate(context)
    with pytest.raises(BridgeError) as building:
        config.build_train_valid_test_datasets(context)
    assert str(validating.value) == str(building.value)
    return str(validating.value)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (GPTDatasetConfig(mock=True), "dataset.sequence_length is not set"),
        (GPTDatasetConfig(mock=True, sequence_length=0), "sequence_length=0 must be at least 1"),
        (GPTDatasetConfig(sequence_length=8), "no data: set dataset.data_paths"),
        (GPTDatasetConfig(sequence_length=8, mock=True, data_paths=["a"]), "would ignore dataset.data_paths"),
        (GPTDatasetConfig(sequence_length=8, data_paths=["a"], test_data_paths=["b"]), "exclude each other"),
        (GPTDatasetConfig(sequence_length=8, data_paths=["a"], split="0,1,0"), "leaves nothing to train on"),
        (GPTDatasetConfig(sequence_length=8, data_paths=["a"], split="0,0"), "sums to 0"),
        (GPTDatasetConfig(sequence_length=8, valid_data_paths=["a"]), "dataset.train_data_paths is not set"),
        (GPTDatasetConfig(sequence_length=8, data_paths=["/no/such"]), "data preprocess .* --output /no/such"),
    ],
)
def test_what_cannot_work_is_refused(tokenizer: Tokenizer, config: GPTDatasetConfig, complaint: str) -> None:
    import re

    assert re.search(complaint, _refusal(config, _context(tokenizer)))


def test_too_little_text_names_the_split_and_the_figures(
    tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.txt").write_text("one document only")
    made = preprocess_corpus([tmp_path / "a.txt"], tmp_path / "a", tokenizer_folder)
    said = _refusal(_config(str(tmp_path / "a"), split="1"), _context(tokenizer, 10, 0))
    assert f"the train split of '{tmp_path}/a' has {made.tokens} tokens in 1 of 1 documents" in said
    assert "needs dataset.sequence_length + 1 = 65 tokens" in said
    (tmp_path / "a.txt").write_text("one document only " * 1000)
    preprocess_corpus([tmp_path / "a.txt"], tmp_path / "a", tokenizer_folder, overwrite=True)
    said = _refusal(_config(str(tmp_path / "a"), split="90,10,0"), _context(tokenizer, 10, 10))
    assert "not enough text: the valid split" in said
    assert "has 0 tokens in 0 of 1 documents by dataset.split='90,10,0', which divides by document" in said


def test_another_tokenizer_is_refused(prefix: str, tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    from megatron.bridge.data.tokenizers import train_bpe_tokenizer

    other_folder = train_bpe_tokenizer([text.upper() for text in texts], 600, tmp_path / "upper")
    other = build_tokenizer(TokenizerConfig(tokenizer_model=str(other_folder)))
    said = _refusal(_config(prefix), _context(other))
    assert "were made with the tokenizer" in said
    assert "the same ids mean different text" in said
    small = build_tokenizer(TokenizerConfig(vocab_size=100))
    assert "ends at 99" in _refusal(_config(prefix), _context(small))
    _config(prefix).validate(_context(build_tokenizer(TokenizerConfig(vocab_size=600))))


def test_ids_beyond_the_vocabulary_are_found_without_a_sidecar(prefix: str, tokenizer: Tokenizer) -> None:
    largest = json.loads(Path(prefix + ".json").read_text())["max_token_id"]
    Path(prefix + ".json").unlink()
    fits = build_tokenizer(TokenizerConfig(vocab_size=largest + 1))
    train, *_ = _config(prefix).build_train_valid_test_datasets(_context(fits))
    assert len(train) >= 100  # type: ignore[arg-type]
    narrow = build_tokenizer(TokenizerConfig(vocab_size=largest))
    for _ in ("read from the cache", "scanned anew"):
        with pytest.raises(BridgeError, match=f"hold the token id {largest}, .* ends at {largest - 1}"):
            _config(prefix).build_train_valid_test_datasets(_context(narrow))
        shutil.rmtree(Path(prefix).parent / "cache", ignore_errors=True)


def test_a_cache_that_cannot_be_written_is_refused(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(BridgeError, match=r"set dataset\.path_to_cache"):
        _config(prefix, path_to_cache=str(tmp_path / "taken")).build_train_valid_test_datasets(_context(tokenizer))


def test_weights_need_a_number_of_samples(prefix: str, tokenizer: Tokenizer) -> None:
    said = _refusal(_config("0.5", prefix, "0.5", prefix + "2"), _context(tokenizer, None, 0))
    assert "blends by weight, so one pass over it is not defined" in said


def _on_ranks(count: int, function: Callable[..., object], *args: object) -> list[object]:
    import megatron.core.datasets.gpt_dataset  # noqa: F401  # warm the parent: the ranks are forked from it

    from megatron.bridge.testing import run_ranks

    return run_ranks(count, function, *args, timeout=100)


def test_every_rank_reads_the_same_samples(prefix: str, tokenizer: Tokenizer) -> None:
    def build() -> list[list[int]]:
        train, valid, _ = _config(prefix).build_train_valid_test_datasets(_context(tokenizer))
        return _rows(train, 20) + _rows(valid, 5)

    first, second = _on_ranks(2, build)
    assert first == second
    shutil.rmtree(Path(prefix).parent / "cache")
    assert build() == first, "as one process without torch.distributed does"


def test_a_refusal_on_one_rank_reaches_all(prefix: str, tokenizer: Tokenizer) -> None:
    def build() -> str:
        from torch.distributed import get_rank

        path = prefix if get_rank() == 0 else "/no/such/prefix"
        with pytest.raises(BridgeError) as refusal:
            _config(path).build_train_valid_test_datasets(_context(tokenizer))
        return str(refusal.value)

    first, second = _on_ranks(2, build)
    assert str(first).startswith("rank 1: no data at '/no/such/prefix'")
    assert str(second).startswith("no data at '/no/such/prefix'")
