"""The curves of runs, from their `metrics.jsonl`. Torch-free."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.loggers.jsonl import METRICS_FILE

type Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """A run's metrics.

    Attributes:
        name: what tells it from the others.
        curves: metric -> (iteration, value), by iteration; each iteration once.
    """

    name: str
    curves: dict[str, Curve]


def read_runs(paths: list[Path]) -> list[Run]:
    """The runs that `paths` name: run folders, or files like `metrics.jsonl`.

    Raises:
        BridgeError: no such file, one without records, or a line that is no record; names file and line.
    """
    files = [_metrics_file(path) for path in paths]
    names = [str(path) for path in paths]
    if len({path.name for path in paths}) == len(paths):
        names = [path.resolve().name for path in paths]
    return [Run(name, _curves(file)) for name, file in zip(names, files, strict=True)]


def _metrics_file(path: Path) -> Path:
    """The file of a run; under a run folder it may lie one level down, beside the checkpoints."""
    if path.is_file():
        return path
    for file in (path / METRICS_FILE, *sorted(path.glob(f"*/{METRICS_FILE}"))):
        if file.is_file():
            return file
    raise BridgeError(
        f"{path} holds no {METRICS_FILE}; name a run's logger.folder or checkpoint.save, or the file itself"
    )


def _curves(file: Path) -> dict[str, Curve]:
    """A run that was resumed did some steps twice: the later record of a step counts."""
    points: dict[str, dict[int, float]] = {}
    for record in _records(file):
        iteration = record.pop("iteration")
        for name, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(name, {})[iteration] = float(value)
            else:
                # A step that was done again may have no value where it once had one.
                points.setdefault(name, {}).pop(iteration, None)
    if not points:
        raise BridgeError(f"{file} has no records yet")
    return {name: sorted(each.items()) for name, each in points.items()}


def _records(file: Path) -> Iterator[dict[str, Any]]:
    lines = file.read_text("utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["iteration"] += 0
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                return  # a run that was killed, or goes on, may have half a line at its end
            raise BridgeError(f"{file}:{number} is no record of metrics: {line[:60]!r}") from error
        yield record
