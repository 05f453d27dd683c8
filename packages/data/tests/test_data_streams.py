"""The stream of tokens: what a run draws is the same whatever workers, ranks and resumes there are."""

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.bridge.data import (
    DatasetBuildContext,
    GPTDatasetConfig,
    TextDatasetConfig,
    TokenizerConfig,
    build_data_iterator,
    build_tokenizer,
)
from megatron.bridge.data.epochs import Reshuffled
from megatron.bridge.data.tokenizers import Tokenizer
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import run_ranks

STEPS, GLOBAL, LENGTH = 12, 8, 32


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(tokenizer_model=str(tokenizer_folder)))


@pytest.fixture(scope="module")
def kinds(corpus_prefix: str, texts: list[str], tokenizer: Tokenizer, tmp_path_factory: Any) -> dict[str, Any]:
    """Training sets of each kind; the last are drawn for more than one epoch."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "a.txt").write_text("\n".join(texts[:5]))
    (folder / "b.txt").write_text("\n".join(texts[5:10]))
    context = DatasetBuildContext(train_samples=STEPS * GLOBAL, tokenizer=tokenizer)
    shared: dict[str, Any] = {"sequence_length": LENGTH, "split": "1"}
    gpt = GPTDatasetConfig(data_paths=[corpus_prefix], **shared)
    blend = TextDatasetConfig(
        data_paths=["0.7", str(folder / "a.txt"), "0.3", str(folder / "b.txt")], document="paragraph", **shared
    )
    made = {name: each.build_train_valid_test_datasets(context)[0] for name, each in (("gpt", gpt), ("blend", blend))}
    few = GPTDatasetConfig(mock=True, sequence_length=LENGTH)
    one_pass = few.build_train_valid_test_datasets(DatasetBuildContext(train_samples=29, tokenizer=tokenizer))[0]
    return made | {"cyclic": Reshuffled(_First(one_pass, 29), seed=5)}


class _First:
    def __init__(self, dataset: Any, size: int) -> None:
        self.dataset, self.size = dataset, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


def _steps(dataset: Any, first: int, last: int, ranks: int = 1, workers: int = 0, micro: int = 2) -> list[str]:
    """A digest of each step's samples, in the order of a single rank."""
    streams = [
        build_data_iterator(dataset, micro, GLOBAL, rank, ranks, GLOBAL * first, num_workers=workers)
        for rank in range(ranks)
    ]
    found = []
    for _ in range(first, last):
        digest = hashlib.sha256()
        for _ in range(GLOBAL // (micro * ranks)):
            for stream in streams:
                digest.update(next(stream)["tokens"].numpy().tobytes())
        found.append(digest.hexdigest())
    assert {stream.state_dict()["consumed_samples"] for stream in streams} == {GLOBAL * last}
    return found


@pytest.mark.parametrize("kind", ["gpt", "blend", "cyclic"])
def test_a_resumed_stream_is_the_same(kind: str, kinds: dict[str, Any]) -> None:
    whole = _steps(kinds[kind], 0, STEPS)
    assert len(set(whole)) == STEPS
    for workers, ranks in ((0, 2), (2, 1), (0, 4), (2, 2)):
        begun = _steps(kinds[kind], 0, 5, ranks=2)
        assert begun + _steps(kinds[kind], 5, STEPS, ranks, workers) == whole, (workers, ranks)


def test_every_epoch_holds_each_sample_once_in_an_order_of_its_own() -> None:
    endless, other = Reshuffled(list(range(10)), seed=1), Reshuffled(list(range(10)), seed=2)
    epochs = [[endless[10 * epoch + place] for place in range(10)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [endless[place] for place in range(10)] == epochs[0]  # also when it is gone back to
    assert [other[place] for place in range(10)] != epochs[0]
    with pytest.raises(BridgeError, match="the dataset is empty"):
        Reshuffled([], seed=1)


def test_a_state_is_loaded_before_the_first_batch(kinds: dict[str, Any]) -> None:
    begun = build_data_iterator(kinds["gpt"], 2, GLOBAL, 0, 2)
    for _ in range(4):
        next(begun)
    state = begun.state_dict()
    assert state == {"consumed_samples": 2 * GLOBAL}
    with pytest.raises(BridgeError, match="4 micro-batches have been drawn already"):
        begun.load_state_dict(state)
    resumed = build_data_iterator(kinds["gpt"], 2, GLOBAL, 0, 2, num_workers=2)
    resumed.load_state_dict(state)
    assert (next(resumed)["tokens"] == next(begun)["tokens"]).all()
    assert resumed.state_dict() == begun.state_dict()


def test_workers_outlive_the_signals_that_stop_a_run(kinds: dict[str, Any]) -> None:
    def work() -> int:
        os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)
        batches = build_data_iterator(kinds["gpt"], 2, GLOBAL, num_workers=2)
        next(batches)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(0, number)
        return sum(len(next(batches)["tokens"]) for _ in range(20))

    assert run_ranks(1, work, timeout=60) == [40]


class TestText:
    """Text that is tokenized when the run starts."""

    def config(self, path: Path, **fields: Any) -> TextDatasetConfig:
        return TextDatasetConfig(data_paths=[str(path)], sequence_length=LENGTH, split="90,10,0", **fields)

    def test_it_is_tokenized_once_and_again_when_it_changes(
        self, tmp_path: Path, text_folder: Path, tokenizer: Tokenizer
    ) -> None:
        context = DatasetBuildContext(train_samples=40, valid_samples=4, tokenizer=tokenizer)
        source = tmp_path / "text.txt"
        source.write_text((text_folder / "003.txt").read_text() * 20)
        config = self.config(source, document="line")
        config.validate(context)
        assert not (tmp_path / "cache").exists()  # looking changes nothing

        def made() -> tuple[list[Any], set[Path]]:
            train, valid, _ = config.build_train_valid_test_datasets(context)
            assert valid is not None
            return [row["tokens"].tolist() for row in train], set((tmp_path / "cache" / "tokens").iterdir())  # type: ignore

        (first, folders), (again, same) = made(), made()
        assert (first, folders) == (again, same)
        source.write_text("something else altogether\n" * 500)
        changed, more = made()
        assert changed != first
        assert len(more) == 2
        # What is tokenized already is checked whole before the model is built.
        with pytest.raises(BridgeError, match="not enough text"):
            TextDatasetConfig(**(vars(config) | {"sequence_length": 10**6})).validate(context)

    def test_ranks_read_what_the_first_one_made(self, tmp_path: Path, text_folder: Path, tokenizer: Tokenizer) -> None:
        config = self.config(text_folder, path_to_cache=str(tmp_path))
        context = DatasetBuildContext(train_samples=8, tokenizer=tokenizer)

        def work() -> list[Any]:
            train, *_ = config.build_train_valid_test_datasets(context)
            return [train[index]["tokens"].tolist() for index in range(8)]  # type: ignore[index]

        first, second = run_ranks(2, work, timeout=60)
        assert first == second

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda config, folder: setattr(config, "data_paths", [str(folder / "absent.txt")]), "does not exist"),
            (lambda config, folder: setattr(config, "data_paths", [str(folder)]), "no file at all"),
            (lambda config, folder: setattr(config, "document", "page"), "'page' is none of file, paragraph, line"),
            (lambda config, folder: setattr(config, "mock", True), "needs no text"),
        ],
    )
    def test_what_cannot_be_read_is_refused(
        self, change: Callable[[Any, Path], None], said: str, tmp_path: Path, text_folder: Path, tokenizer: Tokenizer
    ) -> None:
        config = self.config(text_folder)
        change(config, tmp_path)
        with pytest.raises(BridgeError, match=said):
            config.validate(DatasetBuildContext(train_samples=8, tokenizer=tokenizer))

    def test_a_bad_line_is_raised_on_every_rank(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
        config = self.config(tmp_path / "bad.jsonl")
        context = DatasetBuildContext(train_samples=8, tokenizer=tokenizer)

        def work() -> str:
            with pytest.raises(BridgeError) as caught:
                config.build_train_valid_test_datasets(context)
            return str(caught.value)

        for said in run_ranks(2, work, timeout=60):
            assert "bad.jsonl:2 has no key 'text'" in said
