"""What a sink of metrics is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

type Metrics = Mapping[str, float | int | bool]


class MetricLogger(ABC):
    """Takes a run's metrics, on rank 0 alone; it is made when the loop starts and closed when it ends, however it ends.

    A package offers one by an entry point of the group `megatron.bridge.loggers`; `logger.loggers` names those that a
    run uses.

    Args:
        cfg: the run's configuration.
        first: optimizer steps done before; a resumed run repeats the steps after its checkpoint.
        state: what `state()` gave when the checkpoint was saved that the run resumes from; empty for a fresh run.
    """

    # The package that the sink needs, and the extra of this distribution that brings it; None for neither.
    needs: ClassVar[tuple[str, str] | None] = None
    # The field of `LoggerConfig` that asks for the sink, and that it cannot do without; None where there is none.
    setting: ClassVar[str | None] = None

    def __init__(self, cfg: "ConfigContainer", first: int, state: Mapping[str, Any]) -> None:
        self.cfg, self.first = cfg, first

    @classmethod
    def wanted(cls, cfg: "ConfigContainer") -> bool:
        """Whether the configuration asks for it without naming it in `logger.loggers`."""
        return cls.setting is not None and bool(getattr(cfg.logger, cls.setting))

    @abstractmethod
    def log(self, iteration: int, metrics: Metrics) -> None:
        """Take the metrics of a step: `loss` (mean per token), `learning_rate`, `grad_norm` (before clipping),
        `tokens_per_second`, `skipped` (where the update was), `batch_size` (in a run with a ramp-up), and losses beside
        the main one (`load_balancing_loss`, `mtp_1_loss`, ...; see `auxiliary_losses`), and how fast it is
        (`step_seconds`, `tflops_per_device`, `mfu`, `memory_gib`, `forward_backward_seconds`, ...; see `performance`);
        or of an evaluation: `valid_loss`.
        """

    def message(self, text: str) -> None:  # noqa: B027  most sinks have no place for it
        """Take a line for people."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on where this one stops, e.g. a run id; plain data, saved in checkpoints."""
        return {}

    def close(self) -> None:  # noqa: B027
        """Write out what is held back."""
