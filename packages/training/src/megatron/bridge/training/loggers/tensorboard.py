"""TensorBoard's event files."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.training.loggers.base import MetricLogger, Metrics

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


class TensorBoardLogger(MetricLogger):
    """Scalars under the metrics' names, in `logger.tensorboard_dir`."""

    needs: ClassVar[tuple[str, str] | None] = ("tensorboard", "tensorboard")
    setting: ClassVar[str | None] = "tensorboard_dir"

    def __init__(self, cfg: "ConfigContainer", first: int, state: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(cfg, first, state)
        # The earlier values of the steps that are repeated are left out.
        self._writer: Any = SummaryWriter(cfg.logger.tensorboard_dir, purge_step=first + 1)

    def log(self, iteration: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        self._writer.close()
