"""The `.bin`/`.idx` writer against Megatron-Core's own builder and reader, byte for byte."""

from array import array
from pathlib import Path

import numpy as np
import pytest

from megatron.bridge.data.indexed import (
    IndexedDatasetWriter,
    TokenDtype,
    bin_path,
    idx_path,
    open_corpus,
    token_dtype,
)
from megatron.bridge.errors import BridgeError


def _documents(dtype: TokenDtype, seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    top = np.iinfo(dtype).max
    return [draw.integers(0, top, size, dtype=dtype, endpoint=True) for size in (1, 7, 300, 2, 1, 4096)]


def _write(prefix: Path, documents: list[np.ndarray], dtype: TokenDtype) -> None:
    with IndexedDatasetWriter(bin_path(prefix), idx_path(prefix), dtype) as writer:
        for at in range(0, len(documents), 4):
            some = documents[at : at + 4]
            writer.add_documents(np.concatenate(some).tobytes(), array("i", map(len, some)))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_files_are_those_of_megatron_core(tmp_path: Path, dtype: TokenDtype) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    documents = _documents(dtype)
    _write(tmp_path / "ours", documents, dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "core.bin"), dtype=dtype)
    for document in documents:
        builder.add_item(torch.from_numpy(document.astype(np.int64)))
        builder.end_document()
    builder.finalize(str(tmp_path / "core.idx"))

    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "core.bin").read_bytes()
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "core.idx").read_bytes()
    read = IndexedDataset(str(tmp_path / "ours"))
    assert len(read) == len(documents)
    assert all(np.array_equal(read[at], document) for at, document in enumerate(documents))


@pytest.mark.parametrize("vocab_size", [2, 65_499, 65_500, 65_536, 65_537, 250_000])
def test_the_type_of_ids_is_megatron_cores_choice(vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType

    assert token_dtype(vocab_size) is DType.optimal_dtype(vocab_size)


def test_reading_the_index(tmp_path: Path) -> None:
    documents = _documents(np.int32)
    _write(tmp_path / "c", documents, np.int32)
    corpus = open_corpus(str(tmp_path / "c"))
    assert corpus.lengths.tolist() == [1, 7, 300, 2, 1, 4096]
    assert corpus.tokens == 4407
    assert corpus.tokens_between(1, 3) == 307
    assert corpus.max_token_id() == max(int(document.max()) for document in documents)


def test_nothing_is_indexed_when_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), IndexedDatasetWriter(tmp_path / "a.bin", tmp_path / "a.idx", np.uint16):
        raise ZeroDivisionError
    assert not (tmp_path / "a.idx").exists()


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    _write(tmp_path / "c", _documents(np.uint16), np.uint16)
    return tmp_path / "c"


def test_absent_files_are_named_with_the_command_that_makes_them(whole: Path) -> None:
    for suffix, path in (("bin", bin_path(whole)), ("idx", idx_path(whole))):
        kept = path.read_bytes()
        path.unlink()
        with pytest.raises(BridgeError, match=rf"'c\.{suffix}' does not exist .*data preprocess .* --output {whole}"):
            open_corpus(str(whole))
        path.write_bytes(kept)
    assert open_corpus(str(whole)).tokens == 4407
    with pytest.raises(BridgeError, match=r"the folder '.*nowhere' does not exist"):
        open_corpus(str(whole.parent / "nowhere" / "c"))


def test_a_folder_or_a_file_in_place_of_a_prefix_is_explained(whole: Path) -> None:
    for wrong in (whole.parent, whole.with_suffix(".bin")):
        with pytest.raises(BridgeError, match=rf"is not a prefix .*prefixes there: {whole}"):
            open_corpus(str(wrong))


def test_files_that_are_not_whole_are_refused(whole: Path) -> None:
    index, data = idx_path(whole).read_bytes(), bin_path(whole).read_bytes()
    idx_path(whole).write_bytes(index[:-1])
    with pytest.raises(BridgeError, match=r"c\.idx is cut short"):
        open_corpus(str(whole))
    idx_path(whole).write_bytes(b"GARBAGE!!" + index[9:])
    with pytest.raises(BridgeError, match=r"c\.idx is no Megatron-Core index file"):
        open_corpus(str(whole))
    idx_path(whole).write_bytes(index[:9] + b"\x07" + index[10:])
    with pytest.raises(BridgeError, match="version 7"):
        open_corpus(str(whole))
    idx_path(whole).write_bytes(index)
    bin_path(whole).write_bytes(data[:-2])
    with pytest.raises(BridgeError, match=r"c\.bin has 8812 bytes where its index says 8814"):
        open_corpus(str(whole))
