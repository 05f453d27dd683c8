"""Weights & Biases. The key comes from its own login or `WANDB_API_KEY`, never from the configuration."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.training.loggers.base import MetricLogger, Metrics
from megatron.bridge.training.run_config import described

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


class WandbLogger(MetricLogger):
    """A run of `logger.wandb_project`; a resumed run goes on under the same id. `WANDB_MODE=offline` sends nothing."""

    needs: ClassVar[tuple[str, str] | None] = ("wandb", "wandb")
    setting: ClassVar[str | None] = "wandb_project"

    def __init__(self, cfg: "ConfigContainer", first: int, state: Mapping[str, Any]) -> None:
        import wandb

        super().__init__(cfg, first, state)
        settings = cfg.logger
        self._run: Any = wandb.init(
            project=settings.wandb_project,
            entity=settings.wandb_entity,
            name=settings.wandb_exp_name,
            dir=settings.wandb_save_dir,
            id=state.get("id"),
            resume="allow",
            config=described(cfg),
        )

    def log(self, iteration: int, metrics: Metrics) -> None:
        # Its own steps must not go back, and those after a checkpoint are repeated: the iteration is a metric instead.
        self._run.log({"iteration": iteration, **metrics})

    def state(self) -> dict[str, Any]:
        return {"id": self._run.id}

    def close(self) -> None:
        self._run.finish()
