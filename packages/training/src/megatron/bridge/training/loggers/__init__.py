"""Where a run's metrics go: sinks by name, offered under the group `megatron.bridge.loggers`."""

from megatron.bridge.registry import Registry
from megatron.bridge.training.loggers.base import MetricLogger

LOGGERS: Registry[type[MetricLogger]] = Registry("megatron.bridge.loggers", MetricLogger, "logger")

__all__ = ["LOGGERS", "MetricLogger"]
