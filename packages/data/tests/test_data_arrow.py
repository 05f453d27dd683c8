"""Parquet and datasets on disk: the same tokens as from JSONL, in one process or several; refusals say where."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron.bridge.data import arrow_files
from megatron.bridge.data.preprocess import preprocess_corpus
from megatron.bridge.errors import BridgeError


@pytest.fixture(scope="module")
def rows(texts: list[str]) -> list[dict[str, Any]]:
    """More rows than are read at once, some of them without text."""
    pieces = [piece for text in texts for piece in text.split("\n\n")][:2500]
    return [{"id": number, "text": None if number == 7 else piece} for number, piece in enumerate(pieces)]


@pytest.fixture(scope="module")
def sources(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import datasets

    root = tmp_path_factory.mktemp("sources")
    lines = (json.dumps({"text": row["text"] or ""}) + "\n" for row in rows)
    (root / "rows.jsonl").write_text("".join(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "rows.parquet", row_group_size=700)
    datasets.Dataset.from_list(rows).save_to_disk(root / "saved", num_shards=3)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows[:10])}).save_to_disk(root / "splits")
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize(("name", "workers"), [("rows.parquet", 1), ("rows.parquet", 2), ("saved", 1)])
def test_the_tokens_are_those_of_jsonl(
    name: str, workers: int, sources: dict[str, Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    seen = []
    for source, prefix in ((sources["rows.jsonl"], "jsonl"), (sources[name], "other")):
        made = preprocess_corpus([source], tmp_path / prefix, tokenizer_folder, workers=workers, report=seen.append)
        assert made.documents + made.skipped_empty == 2500
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"other{suffix}").read_bytes() == (tmp_path / f"jsonl{suffix}").read_bytes()
    assert seen[-1].done_bytes == seen[-1].total_bytes


def test_the_files_of_a_dataset_are_taken_in_its_order(sources: dict[str, Path], rows: list[dict[str, Any]]) -> None:
    import datasets

    files = arrow_files.saved_dataset_files(sources["saved"])
    assert files is not None
    assert len(files) == 3
    read = [text for file in files for text, _ in arrow_files.column(file, "text")]
    assert read == datasets.load_from_disk(str(sources["saved"]))["text"]


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        ("rows.parquet", "txet", "has no column 'txet'; did you mean 'text'"),
        ("rows.parquet", "id", "the column 'id' holds int .row 1., not text"),
        ("splits", "text", "holds a dataset's splits; name one of them: .*splits/train"),
    ],
)
def test_what_holds_no_text_is_refused(
    name: str, key: str, said: str, sources: dict[str, Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(BridgeError, match=said):
        preprocess_corpus([sources[name]], tmp_path / "out", tokenizer_folder, json_key=key)
    assert list(tmp_path.iterdir()) == []


def test_damage_and_absence_are_told(
    sources: dict[str, Path], tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(sources["rows.parquet"].read_bytes()[:-100])
    with pytest.raises(BridgeError, match=r"cut.parquet cannot be read as Parquet"):
        preprocess_corpus([cut], tmp_path / "out", tokenizer_folder)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "absent.arrow"}]}')
    with pytest.raises(BridgeError, match=r"absent.arrow' of the dataset .* is missing"):
        preprocess_corpus([tmp_path], tmp_path / "out", tokenizer_folder)
    monkeypatch.setattr(arrow_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BridgeError, match=r"megatron-bridge-data\[arrow\]"):
        preprocess_corpus([cut], tmp_path / "out", tokenizer_folder)
