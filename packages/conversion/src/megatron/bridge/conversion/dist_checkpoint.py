"""Megatron-Core distributed checkpoints, written whole or not at all, and read only when they match.

With `checkpoint_save` this is the one place that calls `megatron.core.dist_checkpointing`. A checkpoint is written into
a hidden sibling folder, read back (metadata, file sizes, every key of every rank), renamed, and only then does the
`latest` pointer move. What fails on one rank is raised on every rank, so that nobody waits for a peer that has left.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.checkpoint_files import SideFiles, check_files, listed, publish, read_metadata
from megatron.bridge.conversion.checkpoint_layout import (
    CheckpointError,
    iteration_folder,
    iteration_of,
    latest_iteration,
    resolve,
    saved_iterations,
)
from megatron.bridge.conversion.checkpoint_save import CheckpointSave
from megatron.bridge.conversion.rank_agreement import gather, on_every_rank, on_rank_zero, reason
from megatron.bridge.conversion.sharded_state import ShardedStateDict, expanded, unique_key

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint import Metadata

__all__ = [
    "CheckpointError",
    "CheckpointSave",
    "TensorEntry",
    "check_files",
    "iteration_folder",
    "iteration_of",
    "latest_iteration",
    "load",
    "load_common",
    "publish",
    "read_metadata",
    "resolve",
    "save",
    "saved_iterations",
    "start_save",
    "tensor_index",
]


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a checkpoint: its global shape and dtype."""

    shape: tuple[int, ...]
    dtype: "torch.dtype"


def save(
    root: str | Path,
    iteration: int,
    sharded_state_dict: ShardedStateDict,
    *,
    side_files: SideFiles | None = None,
    content_metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `ROOT/iter_XXXXXXX`, verify it, and make it the latest. Collective: every rank calls it.

    Args:
        root: folder that holds the checkpoints of one run; created when absent, shared by all ranks.
        iteration: number of finished training steps, 0 for converted weights.
        sharded_state_dict: Megatron-Core sharded state dict; values that are not sharded are taken from rank 0.
        side_files: name -> text, bytes, or a file or folder to copy, put beside the tensors (rank 0's are used).
        content_metadata: how the state dict was sharded, given back by `load_common(...)["content_metadata"]`.
        overwrite: replace a checkpoint of the same iteration.

    Returns:
        The finished folder.

    Raises:
        CheckpointError: the target exists or cannot be written, the shards do not cover each tensor exactly once, or
            what was written does not read back. The target and the `latest` pointer are then as they were.
    """
    saving = start_save(
        root,
        iteration,
        sharded_state_dict,
        side_files=side_files,
        content_metadata=content_metadata,
        overwrite=overwrite,
    )
    saving.write()
    return saving.finish()


def start_save(
    root: str | Path,
    iteration: int,
    sharded_state_dict: ShardedStateDict,
    *,
    side_files: SideFiles | None = None,
    content_metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
    background: bool = False,
    prepared: Path | None = None,
) -> CheckpointSave:
    """`save` in steps: call `write()` on what is returned, and `finish()` when it is `ready()`. Collective.

    Args:
        root, iteration, sharded_state_dict, side_files, content_metadata, overwrite: see `save`.
        background: let a thread write copies of the tensors, so that training can go on.
        prepared: see `CheckpointSave`.

    Raises:
        CheckpointError: the shards do not cover each tensor exactly once, or something cannot be pickled.
    """
    _ensure_distributed()
    target = iteration_folder(root, iteration)
    return CheckpointSave(
        target,
        iteration,
        sharded_state_dict,
        side_files or {},
        content_metadata,
        overwrite=overwrite,
        background=background,
        prepared=prepared,
    )


def load(
    path: str | Path,
    sharded_state_dict: ShardedStateDict,
    *,
    strict: bool = True,
    ignore: Collection[str] = (),
) -> ShardedStateDict:
    """Load what `sharded_state_dict` describes; at any parallel layout. Collective: every rank calls it.

    Args:
        path: a checkpoint root (its latest iteration is taken) or one iteration folder.
        sharded_state_dict: what this rank needs; left unchanged.
        strict: refuse a checkpoint that holds tensors nobody asked for.
        ignore: key prefixes that may stay unread all the same, e.g. `("optimizer.",)` to load a model alone.

    Returns:
        A state dict with the loaded values, and the checkpoint's common (not sharded) values beside them.

    Raises:
        CheckpointError: damaged checkpoint, missing or unexpected keys, or a shape that differs: each is named.
    """
    from megatron.core import dist_checkpointing

    _ensure_distributed()
    folder = on_every_rank(lambda: resolve(path), f"cannot load {path}", CheckpointError)
    metadata = on_every_rank(lambda: read_metadata(folder), f"cannot load {folder}", CheckpointError)
    on_rank_zero(lambda: check_files(folder, metadata), f"checkpoint {folder} is damaged", CheckpointError)
    wanted = _without_absent_extra_state(sharded_state_dict, metadata)
    _check_match(folder, metadata, expanded(wanted), strict, ignore)
    loaded: ShardedStateDict = on_every_rank(
        lambda: dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False),
        f"checkpoint {folder} cannot be read",
        CheckpointError,
    )
    return loaded


def load_common(path: str | Path) -> dict[str, Any]:
    """The values of a checkpoint that are not sharded: iteration, scheduler, consumed samples, ... No collective.

    Raises:
        CheckpointError: no checkpoint at `path`, or it cannot be read.
    """
    from megatron.core import dist_checkpointing

    folder = resolve(path)
    try:
        common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(folder))
    except Exception as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {reason(error)}") from error
    return common


def tensor_index(path: str | Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint with its global shape and dtype. Reads the metadata only; no collective.

    Raises:
        CheckpointError: no checkpoint at `path`, its metadata cannot be read, or a file is missing or cut off.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    folder = resolve(path)
    metadata = read_metadata(folder)
    check_files(folder, metadata)
    return {
        key: TensorEntry(tuple(entry.size), entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


# --- reading and checking


def _check_match(folder: Path, metadata: "Metadata", wanted: list[Any], strict: bool, ignore: Collection[str]) -> None:
    """Refuse missing keys, other shapes and (when strict) keys that no rank asked for."""
    stored = metadata.state_dict_metadata
    mine = {unique_key(shard) for shard in wanted}
    asked = set().union(*gather(mine))
    problems: list[str] = []
    missing = asked - stored.keys()
    if missing:
        problems.append(f"the model has what the checkpoint lacks: {listed(missing)}")
    if strict:
        unread = {key for key in stored.keys() - asked if not _may_stay_unread(key, ignore)}
        if unread:
            problems.append(f"the checkpoint has what the model lacks: {listed(unread)}")
    differing = [_shape_difference(shard, stored) for shard in wanted]
    by_rank = gather({text for text in differing if text})
    if any(by_rank):
        problems.append(f"shapes differ: {listed(set().union(*by_rank), separator='; ')}")
    if problems:
        raise CheckpointError(
            f"checkpoint {folder} does not fit this model: " + ". ".join(problems) + ". Is it of another model?"
        )


def _may_stay_unread(key: str, ignore: Collection[str]) -> bool:
    # `common_state` is Megatron-Core's own; `_extra_state` differs between layer specs and holds no weights.
    return key.startswith(("common_state/", *ignore)) or "_extra_state" in key


def _shape_difference(shard: Any, stored: Mapping[str, Any]) -> str | None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    if not isinstance(shard, ShardedTensor) or shard.allow_shape_mismatch or shard.key not in stored:
        return None
    size = getattr(stored[shard.key], "size", None)
    if size is None or tuple(size) == tuple(shard.global_shape):
        return None
    return f"{shard.key} is {list(size)} in the checkpoint, {list(shard.global_shape)} in the model"


def _without_absent_extra_state(sharded_state_dict: ShardedStateDict, metadata: "Metadata") -> ShardedStateDict:
    """A copy without the `_extra_state` objects that the checkpoint lacks: which exist depends on the layer spec."""
    from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    def absent(value: Any) -> bool:
        return (
            isinstance(value, ShardedObject)
            and "_extra_state" in value.key
            and value.unique_key not in metadata.state_dict_metadata
        )

    _, kept = extract_matching_values(sharded_state_dict, absent)
    return dict(kept)


def _ensure_distributed() -> None:
    import torch.distributed

    if not torch.distributed.is_initialized():
        from megatron.bridge.platform import initialize_distributed

        initialize_distributed()
