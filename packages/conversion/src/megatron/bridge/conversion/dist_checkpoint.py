"""Megatron-Core distributed checkpoints, written whole or not at all, and read only when they match.

This is the one place that calls `megatron.core.dist_checkpointing`. A checkpoint is written into a hidden sibling
folder, read back (metadata, file sizes, every key of every rank), renamed, and only then does the `latest` pointer
move. What fails on one rank is raised on every rank, so that nobody waits for a peer that has left.

Saving is synchronous and starts no process: Megatron-Core's own writer would spawn a manager process, which needs a
`__main__` guard in the user's script, and would ask for psutil; torch's plain file writer needs neither and writes the
same format.
"""

import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.checkpoint_layout import (
    METADATA_FILE,
    CheckpointError,
    announce_latest,
    iteration_folder,
    iteration_of,
    latest_iteration,
    resolve,
    saved_iterations,
    write_latest_pointer,
)
from megatron.bridge.conversion.hf.staging import sync_folder
from megatron.bridge.conversion.rank_agreement import gather, on_every_rank, on_rank_zero, reason

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint import Metadata

__all__ = [
    "CheckpointError",
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
    "tensor_index",
]

type ShardedStateDict = dict[str, Any]
type SideFiles = Mapping[str, str | bytes | Path]

_LISTED = 12  # names printed per problem before "and N more"


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
    _ensure_distributed()
    target = iteration_folder(root, iteration)
    partial = target.with_name(f".{target.name}.partial")
    on_rank_zero(
        lambda: _open_partial(target, partial, overwrite), f"cannot write the checkpoint {target}", CheckpointError
    )
    try:
        on_every_rank(lambda: _see_folder(partial), f"cannot write the checkpoint {target}", CheckpointError)
        _write_tensors(partial, sharded_state_dict, content_metadata)
        on_rank_zero(lambda: _write_side_files(partial, side_files or {}), f"side files of {target}", CheckpointError)
        _verify_written(partial, sharded_state_dict)
        on_rank_zero(
            lambda: publish(partial, target, iteration), f"cannot finish the checkpoint {target}", CheckpointError
        )
    except CheckpointError:
        on_rank_zero(lambda: shutil.rmtree(partial, ignore_errors=True), f"cannot remove {partial}", CheckpointError)
        raise
    return target


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
    _check_match(folder, metadata, _expanded(wanted), strict, ignore)
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


# --- writing


def _open_partial(target: Path, partial: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise CheckpointError(
            f"{target} exists; save into another folder, remove it, or pass overwrite=True (--overwrite)"
        )
    if partial.exists():  # left by a run that was killed while writing
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or partial} cannot be made ({error.strerror}); save into another folder"
        ) from error


def _see_folder(partial: Path) -> None:
    if not partial.is_dir():
        raise CheckpointError(
            f"{partial.parent} is not shared: rank 0 created a folder there that this rank cannot see"
        )


def _write_tensors(folder: Path, sharded_state_dict: ShardedStateDict, content_metadata: dict[str, Any] | None) -> None:
    from megatron.core import dist_checkpointing

    # A copy of the outer dict: `save` adds its own keys to it.
    state = dict(sharded_state_dict)
    _check_sharding(_expanded(state))
    on_every_rank(
        lambda: dist_checkpointing.save(
            state,
            str(folder),
            _plain_strategy()(),
            validate_access_integrity=False,  # done above, with the outcome agreed between ranks
            content_metadata=content_metadata,
        ),
        f"cannot write the checkpoint {folder.name.strip('.').removesuffix('.partial')}",
        CheckpointError,
    )


@cache
def _plain_strategy() -> Callable[[], Any]:
    """Megatron-Core's save strategy with torch's synchronous writer beneath it."""
    from megatron.core.dist_checkpointing.mapping import is_main_replica
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreSavePlanner,
        TorchDistSaveShardedStrategy,
        mcore_to_pyt_state_dict,
    )
    from torch.distributed import checkpoint

    class PlainSaveStrategy(TorchDistSaveShardedStrategy):  # type: ignore[misc, unused-ignore]
        def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
            by_key: dict[str, list[Any]] = {}
            for shard in _shards(sharded_state_dict):
                if is_main_replica(shard.replica_id):
                    by_key.setdefault(_unique_key(shard), []).append(shard)
            planner = MCoreSavePlanner(
                flatten_state_dict=False, flatten_sharded_tensors=False, can_run_decentralized_global_plan=False
            )
            writer = checkpoint.FileSystemWriter(checkpoint_dir, thread_count=self.thread_count)
            # Objects are pickled here: a failure must be agreed on before the others wait in `checkpoint.save`.
            state = on_every_rank(lambda: mcore_to_pyt_state_dict(by_key), "cannot serialise", CheckpointError)
            checkpoint.save(state, storage_writer=writer, planner=planner)

    return PlainSaveStrategy


def _write_side_files(folder: Path, side_files: SideFiles) -> None:
    for name, content in side_files.items():
        target = folder / name
        if target.exists() or Path(name).name != name:
            raise CheckpointError(f"a side file cannot be called {name!r}: give a plain name that is not taken")
        if isinstance(content, Path):
            if content.is_dir():
                shutil.copytree(content, target)
            else:
                shutil.copyfile(content, target)
        elif isinstance(content, bytes):
            target.write_bytes(content)
        else:
            target.write_text(content)


def _verify_written(folder: Path, sharded_state_dict: ShardedStateDict) -> None:
    def check() -> None:
        metadata = read_metadata(folder)
        check_files(folder, metadata)
        lost = {_unique_key(shard) for shard in _expanded(sharded_state_dict)} - metadata.state_dict_metadata.keys()
        if lost:
            raise CheckpointError(f"written, but not found when read back: {_names(lost)}")

    on_every_rank(check, f"the checkpoint in {folder.parent} did not verify", CheckpointError)


def publish(partial: Path, target: Path, iteration: int) -> None:
    """Rename a finished folder to its name, in place of one that is there, and make it the latest."""
    announce_latest(target.parent, iteration)
    if target.exists():
        old = target.with_name(f".{target.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed in between
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old)
    else:
        partial.rename(target)
    sync_folder(target.parent)
    write_latest_pointer(target.parent, iteration)


# --- reading and checking


def read_metadata(folder: Path) -> "Metadata":
    """The metadata of a checkpoint folder.

    Raises:
        CheckpointError: it cannot be read, or is something else.
    """
    from torch.distributed.checkpoint import FileSystemReader, Metadata

    from megatron.bridge.platform.memory_limit import memory_limit

    file = folder / METADATA_FILE
    try:
        # The metadata is a pickle, in which a single wrong bit can ask for gigabytes before anything else goes wrong.
        with memory_limit(2**30 + 100 * file.stat().st_size):
            metadata = FileSystemReader(folder).read_metadata()
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read ({reason(error)}); take another checkpoint") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{file} holds a {type(metadata).__name__}, not checkpoint metadata")
    return metadata


def check_files(folder: Path, metadata: "Metadata") -> None:
    """Refuse a checkpoint that lacks a file its metadata names, or holds one cut off."""
    needed: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    problems = []
    for name, size in sorted(needed.items()):
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size < size:
            problems.append(f"{name} is cut off: {file.stat().st_size} of at least {size} bytes")
    if not (folder / "metadata.json").is_file():
        problems.append("metadata.json is missing")
    if problems:
        raise CheckpointError(f"checkpoint {folder} is damaged: {_names(problems)}; copy it again or take another one")


def _check_match(folder: Path, metadata: "Metadata", wanted: list[Any], strict: bool, ignore: Collection[str]) -> None:
    """Refuse missing keys, other shapes and (when strict) keys that no rank asked for."""
    stored = metadata.state_dict_metadata
    mine = {_unique_key(shard) for shard in wanted}
    asked = set().union(*gather(mine))
    problems: list[str] = []
    missing = asked - stored.keys()
    if missing:
        problems.append(f"the model has what the checkpoint lacks: {_names(missing)}")
    if strict:
        unread = {key for key in stored.keys() - asked if not _may_stay_unread(key, ignore)}
        if unread:
            problems.append(f"the checkpoint has what the model lacks: {_names(unread)}")
    differing = [_shape_difference(shard, stored) for shard in wanted]
    by_rank = gather({text for text in differing if text})
    if any(by_rank):
        problems.append(f"shapes differ: {_names(set().union(*by_rank), separator='; ')}")
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


def _check_sharding(shards: list[Any]) -> None:
    """Refuse shards that do not cover each tensor exactly once over all ranks (checked on rank 0)."""
    from megatron.core.dist_checkpointing.validation import validate_sharding_integrity

    described = gather([shard.without_data() for shard in shards])
    on_every_rank(
        lambda: validate_sharding_integrity(described), "the ranks' shards do not fit together", CheckpointError
    )


def _expanded(sharded_state_dict: ShardedStateDict) -> list[Any]:
    """Every sharded tensor and object, factories applied; the given dict stays as it is."""
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

    return list(_shards(load_preprocess(sharded_state_dict)[0]))


def _shards(sharded_state_dict: ShardedStateDict) -> Iterable[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    return (value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedBase))


def _unique_key(shard: Any) -> str:
    # Objects are stored one by one (`key/shard_0_2`), tensors under their global key.
    return str(getattr(shard, "unique_key", shard.key))


def _ensure_distributed() -> None:
    import torch.distributed

    if not torch.distributed.is_initialized():
        from megatron.bridge.platform import initialize_distributed

        initialize_distributed()


def _names(names: Collection[str], separator: str = ", ") -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return separator.join(ordered[:_LISTED]) + more
