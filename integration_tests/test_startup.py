"""Start-up is light: what a first import and the quick commands do not load; `benchmarks/start.py` has the seconds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = "import sys; from megatron.bridge.cli.root import main; main()"
HEAVY = {"torch", "transformers", "numpy", "megatron.core", "safetensors", "rich", "yaml", "datasets"}


def imported(*arguments: str, folder: Path) -> tuple[set[str], str]:
    """Modules that a fresh interpreter loads with these arguments, and what it prints."""
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return set(re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s*(\S+)$", ended.stderr, re.MULTILINE)), ended.stdout


def test_import_is_light(tmp_path: Path) -> None:
    modules, _ = imported("-c", "import megatron.bridge", folder=tmp_path)
    assert "megatron.bridge" in modules
    assert not HEAVY & modules


@pytest.mark.parametrize(
    ("command", "shown"),
    [("--help", "convert"), ("plugins", "convert"), ("models", "Llama"), ("recipes ls", "llama32_1b")],
)
def test_a_light_command_loads_little(tmp_path: Path, command: str, shown: str) -> None:
    modules, printed = imported("-c", COMMAND, *command.split(), folder=tmp_path)
    assert shown in printed
    assert not HEAVY & modules
    # An interpreter that does nothing loads some 60, and the parser of arguments, with what it takes, a hundred.
    assert len(modules) < 400
