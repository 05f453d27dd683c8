"""`metrics.jsonl`: one JSON record per logged step."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.training.loggers.base import MetricLogger, Metrics

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

METRICS_FILE = "metrics.jsonl"


class JSONLLogger(MetricLogger):
    """Appends to `metrics.jsonl` in `logger.folder`, else in `checkpoint.save`."""

    setting: ClassVar[str | None] = "folder"

    def __init__(self, cfg: "ConfigContainer", first: int, state: Mapping[str, Any]) -> None:
        super().__init__(cfg, first, state)
        folder = Path(cfg.logger.folder or cfg.checkpoint.save or "")
        folder.mkdir(parents=True, exist_ok=True)
        # One line per write, so that a killed run leaves whole records.
        self._stream = (folder / METRICS_FILE).open("a", buffering=1)

    @classmethod
    def wanted(cls, cfg: "ConfigContainer") -> bool:
        return bool(cfg.logger.folder or cfg.checkpoint.save)

    def log(self, iteration: int, metrics: Metrics) -> None:
        # JSON has no word for what is not finite.
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._stream.write(json.dumps({"iteration": iteration, **values}) + "\n")

    def close(self) -> None:
        self._stream.close()
