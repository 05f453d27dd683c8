"""The guarded process: tries imports and plugins, and reports each on stdout as one JSON line.

Run by `probe`. What all batches need is imported once; then each batch runs in a fork of this process, so that a crash,
an endless import or a monkey patch of one batch reaches no other. A batch that dies is taken up again after the step
it died in.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

LONGEST_REASON = 600  # characters; some packages print a page of advice


def _import_modules(step: dict[str, Any]) -> None:
    for module in step["modules"]:
        importlib.import_module(module)


def _describe_platform(step: dict[str, Any]) -> Any:
    return importlib.import_module("megatron.bridge.platform").describe()


def _load_offer(step: dict[str, Any]) -> None:
    from megatron.bridge.cli.offers import registry_of

    registry_of(step["group"])[step["name"]]


ACTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "import": _import_modules,
    "platform": _describe_platform,
    "offer": _load_offer,
}


def attempt(step: dict[str, Any]) -> dict[str, Any]:
    """Carry out one step; whatever it raises becomes the reason."""
    begin = time.perf_counter()
    outcome: dict[str, Any] = {"key": step["key"]}
    try:
        outcome["value"] = ACTIONS[step["action"]](step)
    except BaseException as error:
        from megatron.bridge.errors import BridgeError

        kind = "" if isinstance(error, BridgeError) else f"{type(error).__name__}: "
        outcome["reason"] = _shortened(f"{kind}{error}")
        outcome["tolerated"] = isinstance(error, ImportError)
    outcome["seconds"] = round(time.perf_counter() - begin, 3)
    return outcome


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} ..."


@dataclass
class Batch:
    """Steps for one fork, what it reported so far, and what it printed.

    Attributes:
        if_time: left out, even half way, when the time for such batches is over.
    """

    steps: list[dict[str, Any]]
    if_time: bool = False
    report: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    printed: IO[bytes] = field(default_factory=tempfile.TemporaryFile)

    def start(self, seconds: float) -> int:
        """Fork, with `seconds` for each step; returns the fork's process id."""
        pid = os.fork()
        if pid == 0:
            os.dup2(self.printed.fileno(), 1)
            os.dup2(self.printed.fileno(), 2)
            for step in self.steps:
                # SIGALRM's default action ends the process, even one that hangs inside C code.
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, seconds)
                os.write(self.report.fileno(), json.dumps(attempt(step), default=str).encode() + b"\n")
            os._exit(0)
        return pid

    def finish(self, status: int, seconds: float) -> tuple[list[dict[str, Any]], "Batch | None"]:
        """Outcomes of the ended fork, and the batch that is left when it died in a step."""
        self.report.seek(0)
        outcomes = [json.loads(line) for line in self.report]
        rest = self.steps[len(outcomes) :]
        if not rest:
            return outcomes, None
        died = {"key": rest[0]["key"], "reason": _cause_of_death(status, seconds, self._last_words())}
        return [*outcomes, died], Batch(rest[1:], self.if_time) if rest[1:] else None

    def _last_words(self) -> str:
        self.printed.seek(0)
        lines = [line.strip() for line in self.printed.read().decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")


def _cause_of_death(status: int, seconds: float, last_words: str) -> str:
    said = f"; its last line was {last_words[:LONGEST_REASON]!r}" if last_words else ""
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGALRM:
        return f"did not finish within {seconds:.0f} s{said}"
    how = f"crashed with {signal.Signals(-code).name}" if code < 0 else f"ended the process with exit code {code}"
    return f"{how}{said}"


def serve(request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Run all batches of `request`, at most `jobs` at a time, and send each outcome when its batch ends."""
    for module in request["warm"]:
        with contextlib.suppress(Exception):  # a batch that needs it reports why it cannot be imported
            importlib.import_module(module)
    waiting = deque(Batch(**batch) for batch in request["batches"])
    running: dict[int, tuple[Batch, float]] = {}
    while waiting or running:
        while waiting and len(running) < request["jobs"]:
            batch = waiting.popleft()
            limit = min(request["seconds"], request["deadline"] - time.time()) if batch.if_time else request["seconds"]
            if limit > 0:
                running[batch.start(limit)] = batch, limit
        if not running:
            return
        pid, status = os.wait()
        batch, limit = running.pop(pid)
        out_of_time = limit < request["seconds"] and os.waitstatus_to_exitcode(status) == -signal.SIGALRM
        outcomes, rest = batch.finish(status, limit)
        for outcome in outcomes[:-1] if out_of_time else outcomes:
            send(outcome)
        if rest is not None and not out_of_time:
            waiting.append(rest)


def main() -> None:
    """Read a request from stdin, answer on stdout."""
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints must not mix with the answers
    serve(request, lambda outcome: print(json.dumps(outcome), file=answers, flush=True))


if __name__ == "__main__":
    main()
