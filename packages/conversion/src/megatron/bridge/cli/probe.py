"""Trying things in a guarded process: imports and plugins that may fail, crash or never end, without harm to us."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_JOBS = 8
type Batches = Sequence[Sequence[dict[str, Any]]]


@dataclass(frozen=True)
class Outcome:
    """What became of one step.

    Attributes:
        reason: why it failed, or None when it worked.
        value: what the step returned.
        seconds: how long it took; 0 when its process died.
        tolerated: it failed with an ImportError, which packages that only use it optionally catch.
    """

    reason: str | None = None
    value: Any = None
    seconds: float = 0.0
    tolerated: bool = False


def import_step(key: str, modules: Sequence[str]) -> dict[str, Any]:
    """A step that imports modules in order; `key` names its outcome."""
    return {"key": key, "action": "import", "modules": list(modules)}


def platform_step(key: str) -> dict[str, Any]:
    """A step whose value is `megatron.bridge.platform.describe()`."""
    return {"key": key, "action": "platform"}


def offer_step(key: str, group: str, name: str) -> dict[str, Any]:
    """A step that loads the plugin `name` of an entry-point group as its registry would."""
    return {"key": key, "action": "offer", "group": group, "name": name}


def probe(
    batches: Batches, *, if_time: Batches = (), deadline: float = math.inf, warm: Sequence[str] = (), seconds: int = 60
) -> dict[str, Outcome]:
    """Carry out steps in forks of one fresh process.

    Args:
        batches: each runs its steps in order in one fork; batches know nothing of each other.
        if_time: more batches, tried after those as long as `deadline` (of `time.time()`) has not passed.
        warm: modules to import once, before the forks.
        seconds: longest time for one step, and for each module in `warm`.

    Returns:
        An outcome, by key, for every step except those of `if_time` that were not reached.
    """
    both = [{"steps": steps} for steps in batches] + [{"steps": steps, "if_time": True} for steps in if_time]
    keys = [step["key"] for steps in (*batches, *if_time) for step in steps]
    if not keys:
        return {}
    jobs = max(1, min(MAX_JOBS, len(os.sched_getaffinity(0)) // 2))
    limits = {"seconds": seconds, "deadline": deadline, "jobs": jobs}
    request = json.dumps({"path": sys.path, "warm": list(warm), "batches": both, **limits})
    answers, death = _converse(request, limit=seconds * (len(keys) + len(warm)) + 10)
    outcomes = {answer.pop("key"): Outcome(**answer) for answer in map(json.loads, answers.splitlines())}
    if death is None:
        return outcomes
    before = f" while importing {', '.join(warm)}" if warm and not outcomes else ""
    return {key: outcomes.get(key) or Outcome(reason=f"{death}{before}") for key in keys}


def _converse(request: str, limit: float) -> tuple[str, str | None]:
    """Answers of the guarded process; and, in words, how it died before it had answered everything."""
    # -P: the working directory is not on the path of the console script either.
    child = subprocess.Popen(
        [sys.executable, "-P", "-u", "-m", "megatron.bridge.cli.probe_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        answers, errors = child.communicate(request, timeout=limit)
    except subprocess.TimeoutExpired:
        _end(child)
        answers, errors = child.communicate()
        return answers, f"the probing process did not finish within {limit:.0f} s"
    finally:
        _end(child)
    if child.returncode == 0:
        return answers, None
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "")
    code = child.returncode
    how = f"crashed with {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return answers, f"the probing process {how}{f': {last.strip()}' if last else ''}"


def _end(child: subprocess.Popen[str]) -> None:
    # The whole session: forks, and what an import started and left behind.
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
