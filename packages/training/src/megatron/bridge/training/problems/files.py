"""What is wrong with the folders that a run starts from and writes into."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.conversion.checkpoint_layout import resolve, saved_iterations
from megatron.bridge.errors import BridgeError
from megatron.bridge.training.hf_side import hf_start, is_hf_folder, kept_hf_files
from megatron.bridge.training.newest_whole import Found, newest_whole, resumed_path
from megatron.bridge.training.peft_section import is_adapted
from megatron.bridge.training.same_model import other_model_problems

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def checkpoint_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """Checkpoints that are damaged, of another model, or would be written over."""
    checkpoint = cfg.checkpoint
    for name in ("save_interval", "async_save", "most_recent_k", "save_hf"):
        if getattr(checkpoint, name) and checkpoint.save is None:
            yield f"checkpoint.{name} is set, but checkpoint.save is not: there is no folder to save into"
    if checkpoint.load is not None and checkpoint.pretrained_checkpoint is not None and not is_adapted(cfg):
        yield "checkpoint.load and checkpoint.pretrained_checkpoint are both set; keep one"
    if checkpoint.ckpt_step is not None and checkpoint.load is None:
        yield "checkpoint.ckpt_step is set, but checkpoint.load is not: there is no folder to take the iteration from"
    start: Found | None = None
    resumed, pretrained = resumed_path(checkpoint), checkpoint.pretrained_checkpoint
    try:
        start = None if resumed is None else newest_whole(resumed)
    except BridgeError as error:
        yield f"checkpoint.load: {error}"
    if start is not None:
        yield from other_model_problems("checkpoint.load", start.folder, cfg)
    try:
        if pretrained is not None:
            weights = Path(pretrained) if is_hf_folder(pretrained) else resolve(pretrained)
            yield from other_model_problems("checkpoint.pretrained_checkpoint", weights, cfg)
    except BridgeError as error:
        yield f"checkpoint.pretrained_checkpoint: {error}"
    if checkpoint.save is not None:
        refused = refused_folder(Path(checkpoint.save))
        if refused:
            yield f"checkpoint.save={checkpoint.save!r}: {refused}; save into another folder"
        else:
            yield from _save_folder(Path(checkpoint.save), start)
    yield from _hf_side(cfg)


def _hf_side(cfg: "ConfigContainer") -> Iterator[str]:
    for name in ("hf_save_path", "save_hf"):
        asked = getattr(cfg.checkpoint, name)
        if asked and not (getattr(cfg.model, "bridge", None) or hf_start(cfg) or kept_hf_files(cfg)):
            yield (
                f"checkpoint.{name} is set, and nothing tells which Hugging Face model this is; make the provider "
                "with AutoBridge.to_megatron_provider(), or start from a checkpoint that holds the Hugging Face files"
            )
    if cfg.checkpoint.hf_save_path is None:
        return
    folder = Path(cfg.checkpoint.hf_save_path)
    refused = "it is there already" if os.path.lexists(folder) else refused_folder(folder)
    if refused:
        yield f"checkpoint.hf_save_path={str(folder)!r}: {refused}; write into another folder"


def _save_folder(save: Path, resumed: "Found | None") -> Iterator[str]:
    """A run never writes over another run's checkpoints, and says so before the first step, not after the last."""
    ahead = saved_iterations(save)
    if resumed is not None and resumed.folder.parent.resolve() == save.resolve():
        set_aside = {saved_iteration(folder) for folder in resumed.damaged}
        ahead = [number for number in ahead if number > saved_iteration(resumed.folder) and number not in set_aside]
    if ahead:
        yield (
            f"checkpoint.save={str(save)!r} already holds iteration {ahead[-1]}; resume from it with "
            f"checkpoint.load={str(save)!r}, or save into another folder"
        )


def refused_folder(folder: Path) -> str | None:
    """Why nothing can be written into a folder that may not exist yet."""
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    if not place.is_dir():
        return f"{place} is not a folder"
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
        return f"this user may not write into {place}"
    return None


def saved_iteration(folder: Path) -> int:
    """The iteration of a checkpoint folder, 0 for a folder without one in its name."""
    from megatron.bridge.conversion.checkpoint_layout import iteration_of

    return iteration_of(folder) or 0
