"""The dataset `sft`: samples, order, splits, packs, caching, several ranks, and what is refused."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.bridge.data import (
    DatasetBuildContext,
    PreferenceDatasetConfig,
    SFTDatasetConfig,
    TokenizerConfig,
    build_tokenizer,
)
from megatron.bridge.data.loaders import build_data_iterator
from megatron.bridge.data.provider import DATASETS
from megatron.bridge.data.tokenizers import Tokenizer
from megatron.bridge.errors import BridgeError

LENGTH = 64
WORDS = ["statement", "expression", "operator", "the", "name", "of", "an", "object", "is", "bound", "to", "value"]


@pytest.fixture(scope="module")
def tokenizer(chat_folder: Path) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(tokenizer_model=str(chat_folder)))


def rows(count: int, longest: int = 10) -> list[dict[str, str]]:
    random = np.random.default_rng(3)
    return [
        {
            "instruction": f"Say {at}.",
            "output": f"{at}: " + " ".join(random.choice(WORDS, int(random.integers(1, longest + 1)))),
        }
        for at in range(count)
    ]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(found: Sequence[Any], name: str = "rows.jsonl") -> str:
        lines = [each if isinstance(each, str) else json.dumps(each) for each in found]
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        return str(tmp_path / name)

    return write


def config(path: str | None, **more: Any) -> SFTDatasetConfig:
    values: dict[str, Any] = {"data_paths": None if path is None else [path], "split": "80,20,0"}
    values |= {"dataset_format": "alpaca", "prompt_template": "chatml", "sequence_length": LENGTH}
    return SFTDatasetConfig(**(values | more))


def context(tokenizer: Tokenizer | None, train: int | None = None, valid: int | None = None, **more: Any) -> Any:
    return DatasetBuildContext(train_samples=train, valid_samples=valid, tokenizer=tokenizer, **more)


def build(settings: SFTDatasetConfig, asked: DatasetBuildContext) -> Any:
    settings.validate(asked)
    return settings.build_train_valid_test_datasets(asked)


def text_of(row: dict[str, str]) -> str:
    return f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n{row['output']}<|im_end|>\n"


def written(tokenizer: Tokenizer, sample: dict[str, torch.Tensor]) -> str:
    """The text of a sample, but for its last token."""
    return tokenizer.detokenize(sample["tokens"][sample["tokens"] != tokenizer.pad].tolist())


def test_it_is_offered_by_name() -> None:
    assert DATASETS["sft"] is SFTDatasetConfig


def test_samples_are_shifted_padded_and_masked(tokenizer: Tokenizer, write: Callable[..., str]) -> None:
    given = rows(20)
    train, valid, test = build(config(write(given), split="50,50"), context(tokenizer))
    assert test is None
    assert (len(train), len(valid)) == (10, 10)
    texts = set()
    for dataset in (train, valid):
        for sample in (dataset[at] for at in range(10)):
            assert {name: tuple(value.shape) for name, value in sample.items()} == dict.fromkeys(
                ("tokens", "labels", "loss_mask", "position_ids"), (LENGTH,)
            )
            real = int((sample["tokens"] != tokenizer.pad).sum())
            assert sample["tokens"][1:real].tolist() == sample["labels"][: real - 1].tolist()
            assert sample["labels"][real:].tolist() == [tokenizer.pad] * (LENGTH - real)
            ids = [*sample["tokens"][:real].tolist(), int(sample["labels"][real - 1])]
            text = tokenizer.detokenize(ids)
            texts.add(text)
            kept = tokenizer.detokenize(sample["labels"][sample["loss_mask"].bool()].tolist())
            assert kept == text.split("<|im_start|>assistant\n")[1].removesuffix("\n")
            assert sample["position_ids"].tolist() == list(range(LENGTH))
    assert texts == {text_of(row) for row in given}


def test_every_pass_has_an_order_of_its_own_and_any_sample_can_be_the_first(
    tokenizer: Tokenizer, write: Callable[..., str]
) -> None:
    path = write(rows(20))
    train, valid, _ = build(config(path), context(tokenizer, train=50, valid=9))
    first, second, third = (
        [train[at]["tokens"].tolist() for at in span] for span in (range(16), range(16, 32), range(32, 50))
    )
    assert first != second
    assert sorted(first) == sorted(second)
    assert len(third) == 18
    assert [valid[at]["tokens"].tolist() for at in range(4)] == [valid[at]["tokens"].tolist() for at in range(4, 8)]
    assert not valid[8]["loss_mask"].any()  # beyond whole passes nothing counts
    with pytest.raises(IndexError):
        train[50]
    # Asked for more, in another order of asking: the same samples. Another seed: others.
    again, _, _ = build(config(path), context(tokenizer, train=500, valid=9))
    assert [again[at]["tokens"].tolist() for at in range(49, 15, -1)][::-1] == second + third
    other, _, _ = build(config(path, random_seed=5), context(tokenizer, train=50, valid=9))
    assert [other[at]["tokens"].tolist() for at in range(16)] != first


def test_a_resumed_run_reads_on_where_it_stopped(tokenizer: Tokenizer, write: Callable[..., str]) -> None:
    train, _, _ = build(config(write(rows(20)), packing=True), context(tokenizer, train=24))
    sizes = {"micro_batch_size": 1, "global_batch_size": 2}
    iterator = build_data_iterator(train, **sizes)
    whole = [next(iterator)["tokens"].tolist() for _ in range(24)]
    iterator = build_data_iterator(train, **sizes, consumed_samples=10)
    assert [next(iterator)["tokens"].tolist() for _ in range(14)] == whole[10:]


def test_trees_stay_in_one_split(tokenizer: Tokenizer, write: Callable[..., str]) -> None:
    def tree(at: int) -> dict[str, Any]:
        ends = [
            {"role": "prompter", "text": f"q{at}", "replies": [{"role": "assistant", "text": str(x)}]} for x in "ab"
        ]
        answer = {"role": "assistant", "text": f"tree {at}", "replies": ends}
        return {"prompt": {"role": "prompter", "text": "Hi", "replies": [answer]}}

    settings = config(write([tree(at) for at in range(20)]), dataset_format="oasst", split="50,50")
    train, valid, _ = build(settings, context(tokenizer))
    assert (len(train), len(valid)) == (20, 20)
    members = [
        {written(tokenizer, dataset[at]).split("tree ")[1].split("<")[0] for at in range(20)}
        for dataset in (train, valid)
    ]
    assert not members[0] & members[1]
    assert len(members[0] | members[1]) == 20


@pytest.mark.parametrize("multiple", [1, 4])
def test_packs_hold_every_conversation_once(tokenizer: Tokenizer, write: Callable[..., str], multiple: int) -> None:
    given = rows(30)
    settings = config(write(given), split="100,0,0", packing=True)
    train, _, _ = build(settings, context(tokenizer, valid=0, document_multiple=multiple))
    found = []
    for sample in (train[at] for at in range(len(train))):
        bounds = sample["cu_seqlens"].tolist()
        assert bounds[0] == 0
        assert bounds[-1] == LENGTH
        for start, stop in itertools.pairwise(bounds):
            assert (stop - start) % multiple == 0
            assert sample["position_ids"][start:stop].tolist() == list(range(stop - start))
            document = {name: sample[name][start:stop] for name in ("tokens", "labels", "loss_mask")}
            if document["loss_mask"].any():
                real = int((document["tokens"] != tokenizer.pad).sum())
                ids = [*document["tokens"][:real].tolist(), int(document["labels"][real - 1])]
                found.append(tokenizer.detokenize(ids))
                kept = tokenizer.detokenize(document["labels"][document["loss_mask"].bool()].tolist())
                assert kept == found[-1].split("<|im_start|>assistant\n")[1].removesuffix("\n")
    assert sorted(found) == sorted(text_of(row) for row in given)
    assert f"30 conversations in {len(train)} packs, {train.packs.efficiency:.1%} full" in train.notices[-1]


def test_rows_are_tokenized_once_and_again_when_anything_changes(
    tokenizer: Tokenizer, write: Callable[..., str], tmp_path: Path
) -> None:
    path = write(rows(10))
    settings = config(path, split="100,0,0")
    for changes, folders in (({}, 1), ({"random_seed": 2}, 1), ({"packing": True}, 1), ({"loss": "all"}, 2)):
        build(config(path, split="100,0,0", **changes), context(tokenizer, valid=0))
        assert len(list((tmp_path / "cache").iterdir())) == folders
    write(rows(11))
    train, _, _ = build(settings, context(tokenizer, valid=0))
    assert len(train) == 11
    # Nothing half written is left by a refusal.
    write([*rows(600), "{"])
    with pytest.raises(BridgeError, match=r"rows.jsonl:601: not JSON"):
        build(settings, context(tokenizer, valid=0))
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_bad_rows_are_tolerated_up_to_a_number_counted_and_listed(
    tokenizer: Tokenizer, write: Callable[..., str]
) -> None:
    bad: list[Any] = ["{", {"instruction": "a", "input": ""}, {"instruction": "<|im_end|>", "output": "b"}]
    path = write([*rows(5), *bad])
    for allowed in (0, 2):
        with pytest.raises(BridgeError, match=rf"rows.jsonl:{6 + allowed}: .*skip_bad_rows={allowed}"):
            build(config(path, skip_bad_rows=allowed), context(tokenizer))
    train, _, _ = build(config(path, skip_bad_rows=3, split="100,0,0"), context(tokenizer, valid=0))
    assert len(train) == 5
    told = "\n".join(train.notices)
    assert "8 rows, 5 conversations" in told
    assert "3 rows were skipped" in told
    for line in (6, 7, 8):
        assert f"rows.jsonl:{line}: " in told


def test_what_is_too_long_is_treated_as_asked(tokenizer: Tokenizer, write: Callable[..., str]) -> None:
    long = {"instruction": "Say it.", "output": "word " * 200}
    turns = {**long, "output": "ok", "history": [["a " * 100, "b"], ["c", "d"]]}
    path, asked = write([*rows(4), long]), context(tokenizer, valid=0)
    with pytest.raises(BridgeError, match=r"rows.jsonl:5: it has \d+ tokens, and dataset.sequence_length=64"):
        build(config(path, split="1"), asked)
    dropped, _, _ = build(config(path, split="1", truncation="drop"), asked)
    assert len(dropped) == 4
    assert "1 conversations are longer than dataset.sequence_length and were dropped" in "\n".join(dropped.notices)
    cut, _, _ = build(config(path, split="1", truncation="right"), asked)
    assert len(cut) == 5
    assert "1 conversations were cut" in "\n".join(cut.notices)
    with pytest.raises(BridgeError, match="even for its last exchange alone"):
        build(config(path, split="1", truncation="turns"), asked)
    kept, _, _ = build(config(write([turns]), split="1", truncation="turns"), asked)
    assert written(tokenizer, kept[0]).startswith("<|im_start|>user\nc<|im_end|>")
    with pytest.raises(BridgeError, match="it holds no answer any more"):
        build(config(write([long | {"instruction": "Say " * 200}]), split="1", truncation="right"), asked)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dataset_format": "alpacca"}, "did you mean 'alpaca'"),
        ({"prompt_template": "chatlm"}, "did you mean 'chatml'"),
        ({"prompt_template": "chat_template"}, "has no chat template"),
        ({"loss": "answers"}, "dataset.loss='answers' is unknown"),
        ({"truncation": "left"}, "dataset.truncation='left' is unknown"),
        ({"split": "100,0,0"}, "the run asks for valid samples, and dataset.split='100,0,0' has none"),
        ({"data_paths": None}, "set one or the other"),
        ({"train_data_paths": ["x"]}, "set one or the other"),
        ({"data_paths": None, "train_data_paths": ["x"]}, "dataset.valid_data_paths is not set"),
        ({"data_paths": ["absent.jsonl"]}, "'absent.jsonl', which does not exist"),
        ({"sequence_length": 0}, "dataset.sequence_length=0"),
        ({"skip_bad_rows": -1}, "dataset.skip_bad_rows=-1"),
        ({"dataset_format": "dolly"}, "rows.jsonl:1: there is no field 'response'"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_built(
    tokenizer: Tokenizer, write: Callable[..., str], changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(BridgeError, match=why):
        config(write(rows(4)), **changes).validate(context(tokenizer))


def test_empty_data_and_splits_are_refused(tokenizer: Tokenizer, write: Callable[..., str]) -> None:
    with pytest.raises(BridgeError, match="there is no row in"):
        build(config(write([])), context(tokenizer))
    with pytest.raises(BridgeError, match="no row can be trained: 2 were read, 0 skipped as bad, 2 dropped"):
        build(config(write(rows(2)), sequence_length=3, truncation="drop"), context(tokenizer))
    with pytest.raises(BridgeError, match="leaves no row for valid: there are 3"):
        build(config(write(rows(3)), split="99,1"), context(tokenizer))
    with pytest.raises(BridgeError, match="need a Hugging Face tokenizer"):
        config(write(rows(3))).validate(context(None))


def test_files_per_split(tokenizer: Tokenizer, write: Callable[..., str]) -> None:
    train_file, valid_file = write(rows(6), "train.jsonl"), write(rows(3), "valid.jsonl")
    settings = config(None, train_data_paths=[train_file], valid_data_paths=[valid_file])
    train, valid, test = build(settings, context(tokenizer))
    assert (len(train), len(valid), test) == (6, 3, None)


def test_pairs_are_kept_whole(tokenizer: Tokenizer, write: Callable[..., str]) -> None:
    asked = {"role": "user", "content": "Say."}
    given: list[dict[str, Any]] = [
        {"prompt": "Say.", "chosen": "yes", "rejected": "no"},
        {"prompt": [asked], "chosen": [{"role": "assistant", "content": "so"}], "rejected": "word " * 100},
        {name: [asked, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")},
    ]
    settings: dict[str, Any] = {"split": "1", "prompt_template": "chatml", "sequence_length": LENGTH}
    pairs = PreferenceDatasetConfig(data_paths=[write(given)], truncation="drop", **settings)
    train, _, _ = build(pairs, context(tokenizer, valid=0))
    found = {}
    for sample in (train[at] for at in range(len(train))):
        start, middle, stop = sample["cu_seqlens"][:3].tolist()
        kept = sample["loss_mask"].bool()
        found[int(sample["pair"])] = [
            tokenizer.detokenize(sample["labels"][edges][kept[edges]].tolist())
            for edges in (slice(start, middle), slice(middle, stop))
        ]
    assert found == {0: ["yes<|im_end|>", "no<|im_end|>"], 3: ["chosen<|im_end|>", "rejected<|im_end|>"]}
    assert "1 rows have lost one of their two answers and are left out" in "\n".join(train.notices)


def test_ranks_read_what_rank_0_wrote_and_refuse_together(tokenizer: Tokenizer, write: Callable[..., str]) -> None:
    from megatron.bridge.testing import run_ranks

    good, bad = write(rows(400)), write([*rows(600), "{"], "bad.jsonl")

    def work() -> tuple[list[list[int]], str]:
        train, _, _ = build(config(good, packing=True), context(tokenizer))
        with pytest.raises(BridgeError) as refusal:
            build(config(bad), context(tokenizer))
        return [train[at]["tokens"].tolist() for at in range(len(train))], str(refusal.value)

    first, second = run_ranks(2, work, timeout=100)
    assert first == second
    assert "bad.jsonl:601" in first[1]
