"""`megatron-bridge data preprocess`, as the command is installed."""

import importlib.metadata
import resource
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from megatron.bridge.data.cli import data
from megatron.bridge.data.indexed import open_corpus


def test_preprocess_says_what_it_made(tmp_path: Path, text_folder: Path, tokenizer_folder: Path) -> None:
    arguments = ["preprocess", str(text_folder), "-o", str(tmp_path / "out"), "-t", str(tokenizer_folder)]
    result = CliRunner().invoke(data, [*arguments, "--workers", "1", "--glob", "00*.txt"], catch_exceptions=False)
    corpus = open_corpus(str(tmp_path / "out"))
    assert result.exit_code == 0
    assert f"{corpus.tokens:,} tokens in 10 documents from 10 files" in result.stdout


def test_it_is_offered_as_a_command() -> None:
    (point,) = importlib.metadata.entry_points(group="megatron.bridge.commands", name="data")
    assert point.load() is data


def test_it_starts_fast(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("some text")
    code = "import sys; from megatron.bridge.data.cli import data; data(sys.argv[1:])"
    command = [sys.executable, "-c", code, "preprocess", str(source), "-t", str(tokenizer_folder)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "-o", str(tmp_path / "out"), "--workers", "1"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU seconds: a busy machine must not fail the test.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert open_corpus(str(tmp_path / "out")).tokens > 0
