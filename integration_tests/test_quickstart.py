"""The main job as a user meets it: interrupted once, continued with the same command, proven at the end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-c", "from megatron.bridge.cli.root import main; main()", "quickstart"]
OPTIONS = ["--work", "job", "--steps", "400", "--seq-length", "32", "--batch", "4", "--tp", "2"]


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *OPTIONS],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=150)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def interrupt_in_training(process: subprocess.Popen[str], metrics: Path) -> str:
    """Ctrl-C as a terminal gives it, to the whole process group, once the first steps are reported."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not _reported(metrics):
        time.sleep(0.01)
    assert _reported(metrics), finish(process)
    os.killpg(process.pid, signal.SIGINT)
    return finish(process)


def _reported(metrics: Path) -> bool:
    return metrics.exists() and metrics.stat().st_size > 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, output of the interrupted run and its exit code, output of the run that finished)"""
    folder = tmp_path_factory.mktemp("quickstart")
    first = start(folder)
    interrupted = interrupt_in_training(first, folder / "job" / "run" / "metrics.jsonl")
    second = start(folder)
    finished = finish(second)
    assert second.returncode == 0, finished
    return folder, (interrupted, first.returncode), finished


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(runs):
    _, (output, code), _ = runs
    assert code == 130, output
    assert "stopped by SIGINT after step" in output
    assert "go on with the same command" in output
    assert "Traceback" not in output


def test_the_same_command_goes_on_where_it_stopped(runs):
    folder, _, output = runs
    assert "make a model: done before" in output
    steps = [
        record["iteration"]
        for line in (folder / "job" / "run" / "metrics.jsonl").read_text().splitlines()
        if "loss" in (record := json.loads(line))
    ]
    assert steps == sorted(set(steps)), "a step was done twice"
    assert steps[-1] == 400


def test_every_step_is_in_the_table_with_its_proof(runs):
    folder, _, output = runs
    steps = json.loads((folder / "job" / "quickstart.json").read_text())["steps"]
    assert [step["name"].split()[0].rstrip(",") for step in steps] == [
        "make", "convert", "preprocess", "train", "resume", "export", "load",
    ]  # fmt: skip
    for step in steps:
        assert step["name"] in output
    assert steps[-1]["proof"].startswith("20 weights bitwise equal; logits differ by")
    assert "generated" in output


def test_the_exported_folder_is_complete(runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = runs[0] / "job" / "exported"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = "def f(x):\n    return x"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_a_finished_or_other_quickstart_is_not_overwritten(runs):
    other = subprocess.run(
        [*COMMAND, *OPTIONS, "--lr", "1e-4"], cwd=runs[0], capture_output=True, text=True, timeout=60, check=False
    )
    assert other.returncode == 1
    assert "holds a quickstart with other options" in other.stderr
