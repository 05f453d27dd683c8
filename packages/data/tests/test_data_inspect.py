"""`megatron-bridge data inspect` and `data prepare`."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from megatron.bridge.data import DatasetBuildContext, SFTDatasetConfig, TokenizerConfig, build_tokenizer
from megatron.bridge.data.cli import data
from megatron.bridge.errors import BridgeError


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Ten short rows and one of 203 tokens or more."""
    found = [{"instruction": "Say.", "output": "x " * at} for at in range(1, 11)]
    found.append({"instruction": "Say.", "output": "word " * 100})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return tmp_path / "rows.jsonl"


def run(name: str, rows: Path, tokenizer: Path, *more: str) -> Result:
    settings = ["--format", "alpaca", "--template", "chatml", "--tokenizer", str(tokenizer)]
    return CliRunner().invoke(data, [name, str(rows), *settings, *more])


def test_inspect_shows_rows_lengths_and_packs(rows: Path, chat_folder: Path) -> None:
    result = run("inspect", rows, chat_folder, "--rows", "2", "--sequence-length", "64", "--truncation", "drop")
    assert result.exit_code == 0, result.output
    assert f"{rows}:1: " in result.output
    assert f"{rows}:2: " in result.output
    assert f"{rows}:3: " not in result.output
    assert "<|im_start|>assistant\n«x x <|im_end|>»\n" in result.output
    assert "11 rows, 10 conversations" in result.output
    assert "1 are longer than sequence_length=64: 0 are cut, 1 dropped (--truncation drop)" in result.output
    assert "packed: " in result.output
    bars = [line for line in result.output.splitlines() if "█" in line]
    assert sum(int(line.split()[-1]) for line in bars) == 11


def test_inspect_fails_where_training_would_refuse(rows: Path, chat_folder: Path) -> None:
    rows.write_text(rows.read_text() + '{"instruction": "a"}\n')
    result = run("inspect", rows, chat_folder, "--sequence-length", "64")
    assert isinstance(result.exception, BridgeError)
    assert "2 rows cannot be used, and skip_bad_rows=0" in str(result.exception)
    assert "there is no field 'output'" in result.output  # all are listed, not just the first
    assert "1 are longer than sequence_length=64: refused" in result.output
    assert run("inspect", rows, chat_folder, "--sequence-length", "64", "--skip-bad-rows", "2").exit_code == 0


def test_colours_on_a_terminal(rows: Path, chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = run("inspect", rows, chat_folder, "--rows", "1")
    assert "\x1b[1;32mx <|im_end|>\x1b[0m" in result.output
    assert "«" not in result.output


def test_prepared_rows_are_not_read_again(rows: Path, chat_folder: Path, tmp_path: Path) -> None:
    more = ["--cache", str(tmp_path / "ready"), "--sequence-length", "64", "--truncation", "drop"]
    result = run("prepare", rows, chat_folder, *more)
    assert "10 conversations" in result.output
    (folder,) = (tmp_path / "ready").iterdir()
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    settings: dict[str, Any] = {"dataset_format": "alpaca", "prompt_template": "chatml", "sequence_length": 64}
    settings |= {"truncation": "drop", "path_to_cache": str(tmp_path / "ready"), "packing": True, "split": "1"}
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(chat_folder)))
    context = DatasetBuildContext(tokenizer=tokenizer)
    train, _, _ = SFTDatasetConfig(data_paths=[str(rows)], **settings).build_train_valid_test_datasets(context)
    assert f"{len(train)} packs, {train.packs.efficiency:.1%} full" in result.output  # type: ignore[arg-type,union-attr]
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(BridgeError, match="--sequence-length is needed"):
        CliRunner().invoke(data, ["prepare", str(rows), "-t", str(chat_folder), "--cache", "x"], catch_exceptions=False)
