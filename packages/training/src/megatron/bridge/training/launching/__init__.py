"""How ranks are started: launchers by name, offered under the group `megatron.bridge.launchers`. Torch-free."""

from megatron.bridge.registry import Registry
from megatron.bridge.training.launching.base import Job, Launcher

LAUNCHERS: Registry[type[Launcher]] = Registry("megatron.bridge.launchers", Launcher, "launcher")

__all__ = ["LAUNCHERS", "Job", "Launcher"]
