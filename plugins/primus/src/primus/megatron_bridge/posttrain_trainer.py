"""Trains by arguments of Primus: from Megatron or Hugging Face weights, all of them or adapters, with an export."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from primus.megatron_bridge.argument_builder import overrides

if TYPE_CHECKING:
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.state import TrainResult


class MegatronBridgePosttrainTrainer:
    """One run.

    Args:
        arguments: by their names in Primus, from `MegatronBridgeArgBuilder`.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = dict(arguments)

    def configured(self) -> "ConfigContainer":
        """The configuration of Megatron Bridge.

        Raises:
            BridgeError: no weights or data are named, or a value does not fit.
        """
        from megatron.bridge.training.finetune import finetune_config
        from megatron.bridge.training.overrides import apply_overrides
        from primus.megatron_bridge.patches import PATCHES

        given = self.arguments
        if given.get("data_path") is None:
            raise BridgeError("no data: set --data_path, or data.data_path in the file")
        cfg = finetune_config(
            self._start(), [str(given["data_path"])], sequence_length=given.get("seq_length", 2048), packing=False
        )
        chosen = ["peft=lora"] if given.get("use_lora") else []
        apply_overrides(cfg, [*chosen, *(_written(name, value) for name, value in overrides(given).items())])
        for name in given.get("patches") or ():
            PATCHES[name](cfg)
        return cfg

    def train(self) -> "TrainResult":
        """Tune, and export where that is asked for."""
        from megatron.bridge.training.finetune import finetune

        return finetune(self.configured(), callbacks=self._callbacks())

    def _start(self) -> str:
        given = self.arguments
        name = "hf_model_name_or_path" if given.get("convert_from_hf") else "load"
        if given.get(name) is None:
            raise BridgeError(f"no weights to start from: set --{name}")
        return str(given[name])

    def _callbacks(self) -> "list[Callback]":
        from megatron.bridge.training.hf_export import ExportHF

        given = self.arguments
        if not given.get("convert_to_hf"):
            return []
        if given.get("hf_save_path") is None:
            raise BridgeError("convert_to_hf exports the tuned model: set hf_save_path, the folder to write")
        return [ExportHF(given["hf_save_path"])]


def _written(name: str, value: Any) -> str:
    """An override as on the command line."""
    import json

    return f"{name}={value if isinstance(value, str) and ',' not in value else json.dumps(value)}"
