"""Tokenizers: exact round trips, equality with transformers, and refusals."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.bridge.data.preprocess.fast_tokenizer import load_fast_tokenizer
from megatron.bridge.data.tokenizers import Tokenizer, TokenizerConfig, build_tokenizer, train_bpe_tokenizer
from megatron.bridge.errors import BridgeError


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(tokenizer_model=str(tokenizer_folder)))


@pytest.fixture
def changed_folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tokenizer_folder, tmp_path / "changed"))


def _set(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@given(text=st.text(max_size=200))
@settings(deadline=None, max_examples=200)
def test_every_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_white_space_and_special_tokens_come_back_exactly(tokenizer: Tokenizer) -> None:
    text = "  a\t b \r\n\n , . <|end_of_text|> n't \u00a0\U0001f600"
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    assert tokenizer.eod in ids
    assert max(ids) < tokenizer.vocab_size


def test_the_folder_is_complete_for_transformers(tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert len(loaded) == 600
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    assert loaded.decode(loaded("Is it  exact ?").input_ids) == "Is it  exact ?"
    assert loaded("").input_ids == [], "no token is added by itself"


def test_the_same_texts_give_the_same_tokenizer(texts: list[str], tokenizer_folder: Path, tmp_path: Path) -> None:
    again = train_bpe_tokenizer(texts, 600, tmp_path / "again")
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in tokenizer_folder.iterdir())
    for path in again.iterdir():
        assert path.read_bytes() == (tokenizer_folder / path.name).read_bytes()


def test_training_compresses(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert len(tokenizer.tokenize(texts[0])) < 0.6 * len(texts[0].encode())


@pytest.mark.parametrize(
    ("vocab_size", "text", "complaint"),
    [
        (258, "abc", "256 bytes and 3 special tokens need 259"),
        (1000, "abc abc", r"yield only \d+ of the vocab_size=1000"),
    ],
)
def test_a_vocabulary_that_cannot_be_had_is_refused(tmp_path: Path, vocab_size: int, text: str, complaint: str) -> None:
    with pytest.raises(BridgeError, match=complaint):
        train_bpe_tokenizer([text], vocab_size, tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(tokenizer_folder: Path) -> None:
    with pytest.raises(BridgeError, match="exists"):
        train_bpe_tokenizer(["abc"], 259, tokenizer_folder)


def test_ids_are_those_of_transformers(tokenizer: Tokenizer, tokenizer_folder: Path, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer_folder)
    for text in texts[:20]:
        assert tokenizer.tokenize(text) == loaded(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_preprocessing_tokenizes_as_training_does(changed_folder: Path, texts: list[str], tokenizer_class: str) -> None:
    """Read directly (the first class) and through transformers (the second, which it partly rebuilds)."""
    from tokenizers import Tokenizer as RustTokenizer

    _set(changed_folder, tokenizer_class=tokenizer_class)
    fast = load_fast_tokenizer(changed_folder)
    slow = build_tokenizer(TokenizerConfig(tokenizer_model=str(changed_folder)))
    assert (fast.eod, fast.vocab_size, fast.fingerprint) == (slow.eod, slow.vocab_size, slow.fingerprint)
    rust = RustTokenizer.from_str(fast.definition)
    for text in [*texts[:10], "<|end_of_text|> x", " \u00e9\u2603"]:
        assert rust.encode(text, add_special_tokens=False).ids == slow.tokenize(text)


def test_a_token_that_transformers_would_add_is_seen(changed_folder: Path) -> None:
    _set(changed_folder, additional_special_tokens=["<|extra|>"], extra_special_tokens=["<|extra|>"])
    fast = load_fast_tokenizer(changed_folder)
    slow = build_tokenizer(TokenizerConfig(tokenizer_model=str(changed_folder)))
    assert fast.fingerprint == slow.fingerprint
    assert fast.vocab_size == slow.vocab_size == 601


def test_files_of_older_releases_count_as_they_do_in_transformers(changed_folder: Path) -> None:
    (changed_folder / "special_tokens_map.json").write_text('{"eos_token": "<|pad|>"}')
    fast = load_fast_tokenizer(changed_folder)
    assert fast.eod == build_tokenizer(TokenizerConfig(tokenizer_model=str(changed_folder))).eod


def test_padding_that_means_something_else_is_not_masked(changed_folder: Path) -> None:
    assert build_tokenizer(TokenizerConfig(tokenizer_model=str(changed_folder))).pad == 2
    _set(changed_folder, pad_token="<|end_of_text|>")
    assert build_tokenizer(TokenizerConfig(tokenizer_model=str(changed_folder))).pad == -1


def test_the_vocabulary_may_be_padded_but_not_cut(tokenizer_folder: Path) -> None:
    assert build_tokenizer(TokenizerConfig(tokenizer_model=str(tokenizer_folder), vocab_size=640)).vocab_size == 640
    with pytest.raises(BridgeError, match="vocab_size=599 is smaller than the 600 ids"):
        build_tokenizer(TokenizerConfig(tokenizer_model=str(tokenizer_folder), vocab_size=599))


@pytest.mark.parametrize(
    "load", [load_fast_tokenizer, lambda folder: build_tokenizer(TokenizerConfig(tokenizer_model=str(folder)))]
)
def test_a_tokenizer_without_an_end_is_refused(changed_folder: Path, load) -> None:  # type: ignore[no-untyped-def]
    _set(changed_folder, eos_token=None)
    with pytest.raises(BridgeError, match="no eos_token"):
        load(changed_folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="is empty"):
        load_fast_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BridgeError, match=r"tokenizer\.json cannot be read"):
        load_fast_tokenizer(tmp_path)


def test_null_tokenizer() -> None:
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=100))
    assert tokenizer.tokenize("3 1 4") == [3, 1, 4]
    assert tokenizer.detokenize([3, 1, 4]) == "3 1 4"
    assert (tokenizer.eod, tokenizer.eos, tokenizer.pad, tokenizer.vocab_size) == (99, 99, -1, 100)
    assert build_tokenizer(TokenizerConfig(vocab_size=100, eod_id=5)).eod == 5
    with pytest.raises(BridgeError, match="id 100 lies outside"):
        tokenizer.tokenize("100")
    with pytest.raises(BridgeError, match="reads decimal ids"):
        tokenizer.tokenize("word")


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (TokenizerConfig(), "tokenizer.vocab_size is not set"),
        (TokenizerConfig(vocab_size=1), "too small"),
        (TokenizerConfig(vocab_size=10, eod_id=10), "eod_id=10 lies outside"),
        (TokenizerConfig(tokenizer_type="hugingface"), "did you mean 'huggingface'"),
        (TokenizerConfig(tokenizer_type="huggingface"), "needs tokenizer.tokenizer_model"),
        (TokenizerConfig(tokenizer_type="null", tokenizer_model="x", vocab_size=9), "'x' would be ignored"),
        (TokenizerConfig(tokenizer_model="x", eod_id=3), "eod_id=3 is for tokenizer_type='null'"),
    ],
)
def test_contradictions_are_refused(config: TokenizerConfig, complaint: str) -> None:
    with pytest.raises(BridgeError, match=complaint):
        build_tokenizer(config)


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, megatron.bridge.data, megatron.bridge.data.cli, megatron.bridge.data.tokenizers.bpe;"
        "from megatron.bridge.data import GPTDatasetConfig, TokenizerConfig, DatasetProvider, preprocess_corpus;"
        "print([m for m in ('torch', 'transformers', 'megatron.core') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
