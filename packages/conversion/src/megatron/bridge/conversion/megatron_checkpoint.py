"""A model's weights as a Megatron distributed checkpoint, with the Hugging Face files that describe it beside them."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion import dist_checkpoint
from megatron.bridge.conversion.hf import copy_companions, write_config
from megatron.bridge.conversion.live import Model
from megatron.bridge.conversion.live_weights import as_chunks
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.auto_bridge import AutoBridge

HF_FILES = "hf"
# What a checkpoint may hold that a loader of weights alone leaves unread.
BESIDES_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state")


def save_model(bridge: "AutoBridge", model: Model, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write `PATH/iter_0000000` and make it the latest. Collective."""
    with tempfile.TemporaryDirectory() as scratch:
        return dist_checkpoint.save(
            path,
            0,
            model_state(as_chunks(model)),
            side_files={HF_FILES: describing_files(bridge, Path(scratch))},
            overwrite=overwrite,
        )


def load_model(model: Model, path: str | Path) -> None:
    """Fill a model with a checkpoint's weights; a run's optimizer and random state are left unread. Collective.

    Raises:
        BridgeError: no checkpoint, a damaged one, or one of another model; the message names the key or the file.
    """
    chunks = as_chunks(model)
    fill(chunks, dist_checkpoint.load(path, model_state(chunks), ignore=BESIDES_WEIGHTS))


def fill(chunks: "Sequence[torch.nn.Module]", loaded: Mapping[str, Any]) -> None:
    """Put a loaded state dict into unwrapped chunks."""
    for key, chunk in zip(state_keys(len(chunks)), chunks, strict=True):
        chunk.load_state_dict(loaded[key])


def describing_files(bridge: "AutoBridge", scratch: Path) -> Path:
    """A folder inside `scratch` with configuration, tokenizer and the like."""
    folder = scratch / HF_FILES
    folder.mkdir()
    if bridge.source is not None:
        copy_companions(bridge.source.folder, folder)
    write_config(folder, bridge.config_json(**bridge.model_bridge.settled_changes()))
    return folder


def holds_hf_files(path: str | Path) -> bool:
    """Whether a checkpoint holds the Hugging Face files that describe it."""
    return (dist_checkpoint.resolve(path) / HF_FILES / "config.json").is_file()


def hf_files(path: str | Path) -> Path:
    """The Hugging Face files inside a checkpoint.

    Raises:
        BridgeError: no checkpoint there, or one that holds none.
    """
    folder = dist_checkpoint.resolve(path) / HF_FILES
    if not holds_hf_files(path):
        raise BridgeError(
            f"the checkpoint {folder.parent} does not say which Hugging Face model it is (no {HF_FILES}/config.json); "
            "use AutoBridge.from_hf_pretrained(MODEL) and load_megatron_model(path)"
        )
    return folder


def state_keys(chunks: int) -> list[str]:
    """Megatron-LM's names of the chunks in a state dict: `model`, or `model0`, `model1`, ... with virtual stages."""
    return ["model"] if chunks == 1 else [f"model{index}" for index in range(chunks)]


def model_state(chunks: "Sequence[torch.nn.Module]", metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Megatron-Core's sharded state dict of unwrapped chunks.

    Args:
        chunks: this rank's, one or one per virtual pipeline stage.
        metadata: Megatron-Core's description of how to name and split what is saved.
    """
    return {
        # Megatron-Core adds process groups to the dict it is given, so it gets a copy.
        key: chunk.sharded_state_dict(metadata=dict(metadata or {}))  # type: ignore[operator]
        for key, chunk in zip(state_keys(len(chunks)), chunks, strict=True)
    }
