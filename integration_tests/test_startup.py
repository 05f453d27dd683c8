"""Start-up is light: what it costs in CPU time, and what it does not import. The best of several counts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = "import sys; from megatron.bridge.cli.root import main; main()"
HEAVY = {"torch", "transformers", "numpy", "megatron.core", "safetensors", "rich"}


def cpu_seconds(*arguments: str, folder: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """CPU seconds of a fresh interpreter with these arguments, its children included."""
    before = os.times()
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return used, ended


def best(count: int, *arguments: str, folder: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    return min((cpu_seconds(*arguments, folder=folder) for _ in range(count)), key=lambda run: run[0])


def test_import_is_light(tmp_path: Path) -> None:
    own = []
    for _ in range(5):
        ended = cpu_seconds("-X", "importtime", "-c", "import megatron.bridge", folder=tmp_path)[1]
        assert ended.returncode == 0
        rows = re.findall(r"^import time:\s+\d+ \|\s+(\d+) \|\s*(\S+)$", ended.stderr, re.MULTILINE)
        cumulative = {name: int(microseconds) for microseconds, name in rows}
        assert not HEAVY & cumulative.keys()
        own.append(cumulative["megatron.bridge"])
    assert min(own) < 50_000, f"microseconds: {own}"


@pytest.mark.parametrize(("command", "shown"), [("--help", "convert"), ("plugins", "convert"), ("models", "Llama")])
def test_a_light_command_is_quick(tmp_path: Path, command: str, shown: str) -> None:
    seconds, ended = best(4, "-c", COMMAND, command, folder=tmp_path)
    assert ended.returncode == 0
    assert shown in ended.stdout
    assert seconds < 0.5


def test_doctor_is_quick_enough(tmp_path: Path) -> None:
    seconds, ended = best(1, "-c", COMMAND, "doctor", folder=tmp_path)
    if seconds >= 10:  # another process may have taken the caches
        seconds, ended = best(2, "-c", COMMAND, "doctor", folder=tmp_path)
    assert ended.returncode == 0, ended.stdout
    assert "megatron-core" in ended.stdout
    assert seconds < 10
