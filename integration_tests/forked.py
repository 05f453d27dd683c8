"""Runs a function, for instance the command line, in a fork of this warm process, and gives back what it wrote."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

SECONDS = 240.0  # for one command; a hang must not take the whole session's time


@dataclass(frozen=True)
class Outcome:
    """How a command ended: `code` is its exit code, `out` and `err` are what it wrote."""

    code: int
    out: str
    err: str


def in_child(function: Callable[[], int], folder: Path, outputs: Path) -> Outcome:
    """Run `function` in a fork of this process with `folder` as its working directory."""
    outputs.mkdir(parents=True, exist_ok=True)
    out, err = outputs / "stdout", outputs / "stderr"
    child = multiprocessing.get_context("fork").Process(target=_child, args=(function, folder, out, err))
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
        pytest.fail(f"no end after {SECONDS:.0f} s\n{out.read_text()}\n{err.read_text()}")
    assert child.exitcode is not None
    return Outcome(child.exitcode, out.read_text("utf-8"), err.read_text("utf-8"))


def _child(function: Callable[[], int], folder: Path, out: Path, err: Path) -> None:
    os.chdir(folder)
    for number, file in ((1, out), (2, err)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    # pytest has its own files in the place of these.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    try:
        code = function()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the parent's exit handlers; what the command started has ended by now.
    os._exit(code)
