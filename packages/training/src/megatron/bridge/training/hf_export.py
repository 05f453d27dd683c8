"""The trained model, or its adapter alone, as a Hugging Face folder when a run ends."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.best import best_folder
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.hf_side import bridge_of, hf_start
from megatron.bridge.training.peft_section import is_adapted

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.state import RunState, TrainResult

# A run that a signal or the clock has stopped is to go on, and may have little time left.
_ENDS = ("train_iters", "callback")


class ExportHF(Callback):
    """Writes `folder`, complete and verified, when the run is done: the best weights where `KeepBest` kept some.

    Args:
        folder: must not exist.
        adapter: write the adapters alone for Hugging Face peft, instead of the model with them merged.
    """

    def __init__(self, folder: str | Path, *, adapter: bool = False) -> None:
        self.folder, self._adapter = Path(folder), adapter

    def on_train_start(self, run: "RunState") -> None:
        if self.folder.exists():
            raise BridgeError(f"the export folder {str(self.folder)!r} exists; choose another")
        if self._adapter and not is_adapted(run.cfg):
            raise BridgeError(
                "there is no adapter to export: peft is not set, e.g. peft=lora; export the model instead"
            )
        if self._adapter:
            run.engine.refuse_adapter_export(run.model)
        _bridge(run.cfg)

    def on_train_end(self, run: "RunState", result: "TrainResult") -> None:
        from megatron.bridge.conversion.checkpoint_layout import saved_iterations
        from megatron.bridge.training.checkpoint import load_checkpoint

        if result.stopped_by not in _ENDS:
            return
        if run.cfg.checkpoint.save is not None and saved_iterations(best_folder(run.cfg)):
            best = dataclasses.replace(run.cfg.checkpoint, load=str(best_folder(run.cfg)), load_rng=False)
            load_checkpoint(run.model, None, None, dataclasses.replace(run.cfg, checkpoint=best))
        if self._adapter:
            run.engine.save_hf_adapter(_base(run.cfg), run.model, self.folder)
        else:
            run.engine.save_hf(_bridge(run.cfg), run.model, self.folder)


def _base(cfg: "ConfigContainer") -> Any:
    """The bridge of the model beneath an adapter, which the adapter's files name."""
    from megatron.bridge import AutoBridge

    start = hf_start(cfg)
    return _bridge(cfg) if start is None else AutoBridge.from_hf_pretrained(start)


def _bridge(cfg: "ConfigContainer") -> Any:
    """What knows the model's Hugging Face side.

    Raises:
        BridgeError: nothing does.
    """
    from megatron.bridge import AutoBridge

    bridge = bridge_of(cfg)
    start = cfg.checkpoint.load or cfg.checkpoint.pretrained_checkpoint
    if bridge is None and start is None:
        raise BridgeError(
            "the model cannot be exported: it came neither from AutoBridge nor from a checkpoint of one; make the "
            "provider by AutoBridge.from_hf_pretrained(...).to_megatron_provider()"
        )
    return bridge or AutoBridge.from_megatron_checkpoint(str(start))
