"""MLflow. Credentials come from its own environment variables, never from the configuration."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.training.loggers.base import MetricLogger, Metrics

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


class MLflowLogger(MetricLogger):
    """A run of `logger.mlflow_experiment`, at `logger.mlflow_tracking_uri`; a resumed run goes on under the same id."""

    needs: ClassVar[tuple[str, str] | None] = ("mlflow", "mlflow")
    setting: ClassVar[str | None] = "mlflow_experiment"

    def __init__(self, cfg: "ConfigContainer", first: int, state: Mapping[str, Any]) -> None:
        import mlflow

        super().__init__(cfg, first, state)
        self._client: Any = mlflow.MlflowClient(tracking_uri=cfg.logger.mlflow_tracking_uri)
        self._id = state.get("id") or self._create(str(cfg.logger.mlflow_experiment))

    def _create(self, experiment: str) -> str:
        known = self._client.get_experiment_by_name(experiment)
        place = self._client.create_experiment(experiment) if known is None else known.experiment_id
        return str(self._client.create_run(place, run_name=self.cfg.logger.mlflow_run_name).info.run_id)

    def log(self, iteration: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._id, name, float(value), step=iteration)

    def state(self) -> dict[str, Any]:
        return {"id": self._id}

    def close(self) -> None:
        self._client.set_terminated(self._id)
