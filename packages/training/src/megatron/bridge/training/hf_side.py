"""The Hugging Face side of a run: a folder to start from, and the files that describe its model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.checkpoint_layout import (
    LATEST_POINTER,
    METADATA_FILE,
    CheckpointError,
    iteration_folder,
    resolve,
)
from megatron.bridge.conversion.hf.names import CONFIG
from megatron.bridge.errors import BridgeError
from megatron.bridge.training.engine import engine_of

if TYPE_CHECKING:
    from megatron.bridge.conversion.auto_bridge import AutoBridge
    from megatron.bridge.training.config import ConfigContainer


def is_hf_folder(path: str | Path) -> bool:
    """Whether `path` is a Hugging Face folder, and no Megatron checkpoint."""
    folder = Path(path)
    megatron = any((folder / name).is_file() for name in (METADATA_FILE, LATEST_POINTER))
    return (folder / CONFIG).is_file() and not megatron


def bridge_of(cfg: "ConfigContainer") -> "AutoBridge | None":
    """The bridge that made the run's model, else that of what it starts from; None where neither is known."""
    from megatron.bridge.conversion.auto_bridge import AutoBridge

    made: AutoBridge | None = getattr(cfg.model, "bridge", None)
    described = hf_start(cfg) or kept_hf_files(cfg)
    return AutoBridge.from_hf_pretrained(described) if made is None and described is not None else made


def hf_start(cfg: "ConfigContainer") -> Path | None:
    """The Hugging Face folder in `checkpoint.pretrained_checkpoint`; None where that is something else."""
    start = cfg.checkpoint.pretrained_checkpoint
    return Path(start) if start is not None and is_hf_folder(start) else None


def kept_hf_files(cfg: "ConfigContainer") -> Path | None:
    """The Hugging Face files in the run's last checkpoint, or in the one that it started from; None without any."""
    from megatron.bridge.conversion.megatron_checkpoint import HF_FILES

    origins = (cfg.checkpoint.save, cfg.checkpoint.load, cfg.checkpoint.pretrained_checkpoint)
    folders = (_newest(origin) / HF_FILES for origin in origins if origin is not None)
    return next((folder for folder in folders if (folder / CONFIG).is_file()), None)


def _newest(origin: str) -> Path:
    """The checkpoint in a folder; the folder itself where it holds none yet, or none any more."""
    try:
        return resolve(origin)
    except CheckpointError:
        return Path(origin)


def write_hf_folder(cfg: "ConfigContainer", model: list[Any], iteration: int) -> Path:
    """The model as a Hugging Face folder that is to become part of a checkpoint; where it lies hidden. Collective.

    Raises:
        CheckpointError: it cannot be written.
    """
    from megatron.bridge.conversion.auto_bridge import AutoBridge
    from megatron.bridge.conversion.megatron_checkpoint import HF_FILES

    assert cfg.checkpoint.save is not None
    target = iteration_folder(cfg.checkpoint.save, iteration)
    # By this name the next run finds and removes what a killed one has left.
    hidden = target.with_name(f".{target.name}.hf.partial")
    bridge = bridge_of(cfg) or AutoBridge.from_megatron_checkpoint(str(cfg.checkpoint.load))
    try:
        engine_of(cfg).save_hf(bridge, model, hidden / HF_FILES, overwrite=True)
    except BridgeError as error:
        raise CheckpointError(f"the Hugging Face folder of {target}: {error}") from error
    return hidden


def load_hf(cfg: "ConfigContainer", model: list[Any], optimizer: Any) -> None:
    """Give a fresh run the weights of the Hugging Face folder in `checkpoint.pretrained_checkpoint`. Collective.

    Raises:
        BridgeError: the folder is damaged, or of another model: each weight without a counterpart is named.
    """
    path = cfg.checkpoint.pretrained_checkpoint
    bridge = bridge_of(cfg)
    assert path is not None
    assert bridge is not None
    bridge.load_hf_weights(model, path)
    if optimizer is not None:
        optimizer.reload_model_params()
