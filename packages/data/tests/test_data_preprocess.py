"""Preprocessing: what is written is the text, whatever the form of the input; failures leave nothing."""

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron.bridge.data.indexed import open_corpus
from megatron.bridge.data.preprocess import preprocess_corpus
from megatron.bridge.data.preprocess.progress import Progress
from megatron.bridge.data.preprocess.sources import read_batches
from megatron.bridge.data.sidecar import read_sidecar
from megatron.bridge.data.standard_library import python_stdlib_files, python_stdlib_texts
from megatron.bridge.data.tokenizers import Tokenizer, TokenizerConfig, build_tokenizer
from megatron.bridge.errors import BridgeError


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(tokenizer_model=str(tokenizer_folder)))


def _documents(prefix: str | Path) -> list[list[int]]:
    """Read back with Megatron-Core."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return [document.tolist() for document in IndexedDataset(str(prefix))]


def _texts(prefix: str | Path, tokenizer: Tokenizer) -> list[str]:
    documents = _documents(prefix)
    assert all(document[-1] == tokenizer.eod for document in documents)
    return [tokenizer.detokenize(document[:-1]) for document in documents]


def _jsonl(path: Path, rows: Sequence[object], key: str = "text") -> Path:
    lines = "".join(json.dumps(row if isinstance(row, dict) else {key: row}) + "\n" for row in rows)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.write(lines)
    return path


def test_a_folder_of_text_comes_back_in_order(corpus_prefix: str, tokenizer: Tokenizer, texts: list[str]) -> None:
    assert _texts(corpus_prefix, tokenizer) == texts
    assert _documents(corpus_prefix) == [[*tokenizer.tokenize(text), tokenizer.eod] for text in texts]


def test_the_sidecar_tells_the_truth(corpus_prefix: str, tokenizer: Tokenizer, texts: list[str]) -> None:
    sidecar = read_sidecar(corpus_prefix)
    assert sidecar is not None
    ids = np.fromfile(corpus_prefix + ".bin", np.uint16)
    assert (sidecar.documents, sidecar.tokens) == (len(texts), len(ids))
    assert sidecar.max_token_id == ids.max() == open_corpus(corpus_prefix).max_token_id()
    assert sidecar.bin_sha256 == hashlib.sha256(Path(corpus_prefix + ".bin").read_bytes()).hexdigest()
    assert (sidecar.tokenizer_fingerprint, sidecar.eod) == (tokenizer.fingerprint, tokenizer.eod)
    assert (sidecar.vocab_size, sidecar.files, sidecar.skipped_empty) == (600, len(texts), 0)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".ndjson"])
def test_json_lines(tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer, suffix: str) -> None:
    rows = ["one\ntwo", "  caf\u00e9 \U0001f600", "", "\u2603\r\n"]
    source = _jsonl(tmp_path / f"rows{suffix}", rows, key="body")
    made = preprocess_corpus([source], tmp_path / "out", tokenizer_folder, json_key="body")
    assert _texts(tmp_path / "out", tokenizer) == ["one\ntwo", "  caf\u00e9 \U0001f600", "\u2603\r\n"]
    assert made.skipped_empty == 1


def test_documents_of_a_text_file(tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "text.txt"
    source.write_bytes(b"\n\na\nb\n\n \nc\r\n\r\nd")
    expected = {"file": [source.read_bytes().decode()], "line": ["a", "b", "c", "d"], "paragraph": ["a\nb", "c", "d"]}
    for document, there in expected.items():
        preprocess_corpus([source], tmp_path / document, tokenizer_folder, document=document)
        assert _texts(tmp_path / document, tokenizer) == there
    with pytest.raises(BridgeError, match="did you mean 'paragraph'"):
        preprocess_corpus([source], tmp_path / "x", tokenizer_folder, document="paragraphs")


def test_the_result_does_not_depend_on_the_workers(
    tmp_path: Path, corpus_prefix: str, text_folder: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.bridge.data.preprocess.sources._BATCH_BYTES", 20_000)
    preprocess_corpus([text_folder], tmp_path / "two", tokenizer_folder, workers=2)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"two{suffix}").read_bytes() == Path(corpus_prefix + suffix).read_bytes()


def test_batches_are_bounded_and_count_every_byte(tmp_path: Path, text_folder: Path) -> None:
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    _jsonl(plain, ["x" * 1000] * 2000)
    _jsonl(packed, ["y" * 1000] * 2000)
    files = [*sorted(text_folder.iterdir()), plain, packed]
    batches = list(read_batches(files))
    assert sum(batch.read_bytes for batch in batches) == sum(path.stat().st_size for path in files)
    assert all(sum(len(raw.data) for raw in batch.documents) < 700_000 for batch in batches)
    assert len(batches) > 8


def test_progress_ends_with_everything_done(tmp_path: Path, text_folder: Path, tokenizer_folder: Path) -> None:
    seen: list[Progress] = []
    made = preprocess_corpus([text_folder], tmp_path / "out", tokenizer_folder, report=seen.append)
    total = sum(path.stat().st_size for path in text_folder.iterdir())
    assert seen[-1] == Progress(total, total, made.documents, made.tokens)


def test_which_files_of_a_folder(tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/c.py", "deep/d.md"):
        (tmp_path / "in" / name).write_text(name)
    preprocess_corpus([tmp_path / "in"], tmp_path / "o1", tokenizer_folder)
    assert _texts(tmp_path / "o1", tokenizer) == ["a.txt", "b.txt"]
    preprocess_corpus([tmp_path / "in"], tmp_path / "o2", tokenizer_folder, globs=["**/*.py", "*.txt"])
    assert _texts(tmp_path / "o2", tokenizer) == ["a.txt", "b.txt", "deep/c.py"]
    with pytest.raises(BridgeError, match=r"matches \*\*/\*\.rs \(it holds 2 \.txt, 1 \.\w+, 1 \.\w+\)"):
        preprocess_corpus([tmp_path / "in"], tmp_path / "o3", tokenizer_folder, globs=["**/*.rs"])
    with pytest.raises(BridgeError, match="is given twice"):
        preprocess_corpus([tmp_path / "in", tmp_path / "in" / "a.txt"], tmp_path / "o3", tokenizer_folder)
    with pytest.raises(BridgeError, match="no folder is given"):
        preprocess_corpus([tmp_path / "in" / "a.txt"], tmp_path / "o3", tokenizer_folder, globs=["*"])
    with pytest.raises(BridgeError, match=r"'.*a\.tx' does not exist; did you mean 'a\.txt'"):
        preprocess_corpus([tmp_path / "in" / "a.tx"], tmp_path / "o3", tokenizer_folder)


GOOD = '{"text": "good"}\n'


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            GOOD + '{"text": "cut sh',
            r"rows\.jsonl:2 is not JSON: Unterminated string .*starts with '\{\"text\": \"cut sh'",
        ),
        (GOOD + "\n" + "[1]\n", r"rows\.jsonl:3 holds an array, not an object"),
        (
            GOOD + '{"txet": "x", "id": 3}\n',
            r"rows\.jsonl:2 has no key 'text'; did you mean 'txet'\? \(it has: 'txet', 'id'\)",
        ),
        (GOOD + '{"text": null}\n', r"rows\.jsonl:2: the value of 'text' is null, not a string"),
        (GOOD + '{"text": ["x"]}\n', r"rows\.jsonl:2: the value of 'text' is an array"),
        (GOOD + '{"text": "\\ud83d"}\n', r"rows\.jsonl:2: character 0 is half of a surrogate pair \(\\ud83d\)"),
        ((GOOD + '{"text": "\xe9"}').encode("latin-1"), r"rows\.jsonl:2 is not UTF-8: byte 0xe9 at offset 10"),
        (GOOD + "[" * 100_000, r"rows\.jsonl:2 is not JSON"),
        ("\n \n", "holds no text .*: 3 bytes"),
        ("", "holds no text"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_left(
    tmp_path: Path, tokenizer_folder: Path, content: str | bytes, complaint: str
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(BridgeError, match=complaint):
        preprocess_corpus([source], tmp_path / "new" / "deep" / "out", tokenizer_folder)
    assert list(tmp_path.iterdir()) == [source]


def test_a_bad_line_found_by_a_worker_process(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(GOOD * 5000 + "oops\n" + GOOD * 5000)
    with pytest.raises(BridgeError, match=r"rows\.jsonl:5001 is not JSON"):
        preprocess_corpus([source], tmp_path / "out", tokenizer_folder, workers=2)
    assert list(tmp_path.iterdir()) == [source]


def test_files_that_cannot_be_text_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    image, cut, value = tmp_path / "image.txt", tmp_path / "cut.jsonl.gz", tmp_path / "value.json"
    image.write_bytes(b"\x89PNG\r\n\x1a\n")
    cut.write_bytes(gzip.compress(GOOD.encode() * 1000)[:-20])
    value.write_text("[]")
    for source, complaint in (
        (image, "image.txt is not UTF-8"),
        (cut, "no whole gzip file"),
        (value, "name it .jsonl"),
    ):
        with pytest.raises(BridgeError, match=complaint):
            preprocess_corpus([source], tmp_path / "out", tokenizer_folder)
    assert sorted(tmp_path.iterdir()) == sorted([image, cut, value])


def test_output_is_replaced_only_when_told_and_only_by_whole_data(
    tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer
) -> None:
    good, bad, prefix = tmp_path / "good.txt", tmp_path / "bad.txt", tmp_path / "out"
    good.write_text("first")
    bad.write_bytes(b"\xff")
    preprocess_corpus([good], prefix, tokenizer_folder)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(BridgeError, match=r"out\.bin' exists; .*--overwrite"):
        preprocess_corpus([good], prefix, tokenizer_folder)
    with pytest.raises(BridgeError, match="not UTF-8"):
        preprocess_corpus([bad], prefix, tokenizer_folder, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    good.write_text("second")
    preprocess_corpus([good], prefix, tokenizer_folder, overwrite=True)
    assert _texts(prefix, tokenizer) == ["second"]


def test_an_interrupt_leaves_nothing(tmp_path: Path, text_folder: Path, tokenizer_folder: Path) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess_corpus([text_folder], tmp_path / "a" / "out", tokenizer_folder, report=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_no_prefix_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("text")
    for output, complaint in ((tmp_path / "out.bin", "leave '.bin' off"), (tmp_path, "must be a prefix, not a folder")):
        with pytest.raises(BridgeError, match=complaint):
            preprocess_corpus([source], output, tokenizer_folder)
    with pytest.raises(BridgeError, match=r"cannot be written: '.*a\.txt' is not a folder"):
        preprocess_corpus([source], source / "out", tokenizer_folder)
    with pytest.raises(BridgeError, match="--workers=0"):
        preprocess_corpus([source], tmp_path / "out", tokenizer_folder, workers=0)


def test_a_sidecar_of_other_data_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    for name in ("short", "a longer text"):
        (tmp_path / f"{name}.txt").write_text(name)
        preprocess_corpus([tmp_path / f"{name}.txt"], tmp_path / name, tokenizer_folder)
    (tmp_path / "short.json").write_text((tmp_path / "a longer text.json").read_text())
    with pytest.raises(BridgeError, match="they do not belong together"):
        read_sidecar(str(tmp_path / "short"))
    (tmp_path / "short.json").write_text("{}")
    with pytest.raises(BridgeError, match="is no side-car"):
        read_sidecar(str(tmp_path / "short"))


def test_the_standard_library_is_real_text_in_a_fixed_order() -> None:
    files = python_stdlib_files()
    assert files == sorted(files)
    assert not any({"test", "site-packages"} & set(path.parts) for path in files)
    texts = list(python_stdlib_texts())
    assert len(texts) == len(files)
    assert 5e6 < sum(map(len, texts)) < 3e7
    assert Path(json.__file__).read_text("utf-8") in texts
