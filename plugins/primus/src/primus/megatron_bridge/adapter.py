"""What Primus asks of a framework: its arguments, and what trains by them."""

from collections.abc import Mapping
from typing import Any

from primus.cli.flags import check_framework
from primus.megatron_bridge.argument_builder import MegatronBridgeArgBuilder
from primus.megatron_bridge.posttrain_trainer import MegatronBridgePosttrainTrainer


class MegatronBridgeAdapter:
    """The framework `megatron_bridge`."""

    def arguments(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        """Flags over the file over the defaults.

        Raises:
            BridgeError: another framework, or a file with keys that mean nothing.
        """
        check_framework(flags["framework"])
        given = {name: value for name, value in flags.items() if value is not None and name != "framework"}
        return MegatronBridgeArgBuilder(given.pop("config", None)).build(given)

    def trainer(self, arguments: Mapping[str, Any]) -> MegatronBridgePosttrainTrainer:
        """What trains by `arguments`."""
        return MegatronBridgePosttrainTrainer(arguments)
