"""A checkpoint on its way to disk: described on every rank, written here or by a thread, then finished together.

Saving starts no process. Megatron-Core's own writers would: they spawn one that runs the user's script again (which
then needs a `__main__` guard) or fork one beside torch's threads, and what they leave behind outlives a killed run. A
thread is enough, as writing and hashing files hold no lock of Python's. It works on copies of the tensors in host
memory, and its ranks agree over a process group of their own, so that training goes on meanwhile.
"""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

from megatron.bridge.conversion.checkpoint_files import (
    Prepared,
    SideFiles,
    check_files,
    listed,
    open_partial,
    publish,
    read_metadata,
    see_folder,
    write_format,
    write_side_files,
)
from megatron.bridge.conversion.checkpoint_layout import CheckpointError
from megatron.bridge.conversion.integrity import digests_of, files_of_rank, other_files, write_manifest
from megatron.bridge.conversion.rank_agreement import all_agree, gather, on_every_rank, on_rank_zero
from megatron.bridge.conversion.sharded_state import ShardedStateDict, check_sharding, expanded, shards, unique_key

type Digests = dict[str, str]


class CheckpointSave:
    """One checkpoint being saved; made on every rank, and every method is collective.

    The bytes are those of the moment it was made: with `background` the tensors that this rank writes are copied to
    host memory then, and held until the save is over.

    Args:
        target: the folder to appear, e.g. `ROOT/iter_0000010`.
        iteration: that `latest` shall name.
        state: Megatron-Core sharded state dict.
        side_files: see `dist_checkpoint.save`; folders and files must stay until the save is over.
        content_metadata: see `dist_checkpoint.save`.
        overwrite: replace a folder that is there.
        background: write in a thread.
        prepared: a folder on the target's file system with files that were written for this checkpoint. They are moved
            into it in the end, and the folder is removed; after a failure they are where they were.

    Raises:
        CheckpointError: the ranks' shards do not fit together, or something cannot be pickled.
    """

    def __init__(
        self,
        target: Path,
        iteration: int,
        state: ShardedStateDict,
        side_files: SideFiles,
        content_metadata: dict[str, Any] | None,
        *,
        overwrite: bool,
        background: bool,
        prepared: Path | None = None,
    ) -> None:
        self._target, self._iteration, self._overwrite = target, iteration, overwrite
        self._partial = target.with_name(f".{target.name}.partial")
        self._prepared = None if prepared is None else Prepared(prepared)
        self._side_files, self._background = side_files, background
        described = expanded(state)
        check_sharding(described)
        self._keys = {unique_key(shard) for shard in described}
        self._tensors, own_bytes = on_every_rank(
            lambda: _torch_state(state, content_metadata, copied=background),
            f"cannot describe the checkpoint {target.name}",
            CheckpointError,
        )
        self._bytes = sum(gather(own_bytes))
        self._group = _writers_group() if background else None
        self._written: Future[Digests] = Future()

    def write(self, wait: float = 0.0) -> None:
        """Write everything into a hidden folder beside the target; with `background` return at once.

        It may be called again after `finish` has failed.

        Args:
            wait: seconds to let pass first.
        """
        self._written = Future()
        if self._background:
            # A daemon: a process that ends in an error does not wait for ranks that may be gone.
            threading.Thread(target=self._write, args=(wait,), name="checkpoint writer", daemon=True).start()
        else:
            self._write(wait)

    def ready(self) -> bool:
        """Whether every rank is done writing, well or not; `finish` then waits for nobody."""
        return all_agree(self._written.done())

    def finish(self) -> Path:
        """Wait for what is being written, verify it, give it its name and make it the latest.

        Raises:
            CheckpointError: (on every rank) something failed; the target and the `latest` pointer are as they were.
        """
        try:
            digests = on_every_rank(
                self._written.result, f"cannot write the checkpoint {self._target}", CheckpointError
            )
            self._verify()
            self._complete(digests)
        except CheckpointError:
            self._remove_partial()
            raise
        return self._target

    def _write(self, wait: float) -> None:
        try:
            time.sleep(wait)
            self._written.set_result(self._write_files())
        except BaseException as error:  # torch's CheckpointException is no Exception
            self._written.set_exception(error)

    def _write_files(self) -> Digests:
        import torch.distributed as dist

        groups = None if self._group is None else [self._group]
        on_rank_zero(self._open, "its folder", CheckpointError, groups)
        on_every_rank(lambda: see_folder(self._partial), "its folder", CheckpointError, groups)
        _save_torch_dist(self._tensors, self._partial, self._group)
        return digests_of(self._partial, files_of_rank(self._partial, dist.get_rank()))

    def _open(self) -> None:
        open_partial(self._target, self._partial, self._overwrite, self._bytes)
        write_side_files(self._partial, self._side_files)

    def _verify(self) -> None:
        def check() -> None:
            metadata = read_metadata(self._partial)
            check_files(self._partial, metadata)
            lost = self._keys - metadata.state_dict_metadata.keys()
            if lost:
                raise CheckpointError(f"written, but not found when read back: {listed(lost)}")

        on_rank_zero(lambda: write_format(self._partial), f"cannot write {self._partial}", CheckpointError)
        on_every_rank(check, f"the checkpoint in {self._target.parent} did not verify", CheckpointError)

    def _complete(self, digests: Digests) -> None:
        by_rank = gather(digests | self._prepared_digests())

        def complete() -> None:
            recorded = {name: digest for found in by_rank for name, digest in found.items()}
            if self._prepared is not None:
                self._prepared.move_into(self._partial)
            write_manifest(self._partial, recorded | digests_of(self._partial, other_files(self._partial, recorded)))
            publish(self._partial, self._target, self._iteration)
            if self._prepared is not None:
                self._prepared.folder.rmdir()

        on_rank_zero(complete, f"cannot finish the checkpoint {self._target}", CheckpointError)

    def _prepared_digests(self) -> Digests:
        """Those of this rank's share of the prepared files."""
        import torch.distributed as dist

        if self._prepared is None:
            return {}
        folder = self._prepared.folder
        mine = other_files(folder, ())[dist.get_rank() :: dist.get_world_size()]
        return on_every_rank(lambda: digests_of(folder, mine), f"cannot read {folder}", CheckpointError)

    def _remove_partial(self) -> None:
        def remove() -> None:
            if self._prepared is not None:
                self._prepared.take_back(self._partial)
            shutil.rmtree(self._partial, ignore_errors=True)

        on_rank_zero(remove, f"cannot remove {self._partial}", CheckpointError)


def _torch_state(state: ShardedStateDict, content_metadata: dict[str, Any] | None, *, copied: bool) -> Any:
    """What this rank writes, as torch's checkpoint writer takes it (tensors, and pickled objects), and its bytes.

    Megatron-Core names, splits and completes it (with the values that are not sharded); nothing is written yet, and
    this is no collective.
    """
    from megatron.core import dist_checkpointing

    strategy = save_strategy()(copied=copied)
    with tempfile.TemporaryDirectory() as unused:
        dist_checkpointing.save(
            dict(state),  # keys are added to it
            unused,
            strategy,
            validate_access_integrity=False,  # done before, with the outcome agreed between ranks
            async_sharded_save=True,
            content_metadata=content_metadata,
        )
    return strategy.taken, strategy.nbytes


@cache
def save_strategy() -> Callable[..., Any]:
    """A save strategy for Megatron-Core that takes what is to be written; `save` writes it, as torch does."""
    from megatron.core.dist_checkpointing.mapping import is_main_replica
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy, mcore_to_pyt_state_dict

    class PlainSaveStrategy(TorchDistSaveShardedStrategy):  # type: ignore[misc, unused-ignore]
        def __init__(self, *, copied: bool = False) -> None:
            super().__init__()
            self._copied = copied
            self.taken: dict[str, Any] = {}
            self.nbytes = 0

        def async_save(self, sharded_state_dict: ShardedStateDict, *_: Any, **__: Any) -> AsyncRequest:
            by_key: dict[str, list[Any]] = {}
            for shard in shards(sharded_state_dict):
                if is_main_replica(shard.replica_id):
                    mine = _on_host(shard) if self._copied else shard
                    by_key.setdefault(unique_key(shard), []).append(mine)
                    self.nbytes += getattr(shard.data, "nbytes", 0)
            self.taken = mcore_to_pyt_state_dict(by_key)
            return AsyncRequest(None, (), [])

        def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
            self.async_save(sharded_state_dict)
            _save_torch_dist(self.taken, Path(checkpoint_dir), None)

    return PlainSaveStrategy


def _on_host(shard: Any) -> Any:
    """A shard with a copy of its tensor in host memory; objects as they are, for they are pickled at once."""
    import copy

    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    if not isinstance(shard, ShardedTensor) or shard.data is None:
        return shard
    held = copy.copy(shard)
    held.data = shard.data.detach().to("cpu", copy=True)
    return held


def _save_torch_dist(tensors: dict[str, Any], folder: Path, group: Any) -> None:
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
    from torch.distributed import checkpoint

    planner = MCoreSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False, can_run_decentralized_global_plan=False
    )
    writer = checkpoint.FileSystemWriter(folder, thread_count=1)
    checkpoint.save(dict(tensors), storage_writer=writer, planner=planner, process_group=group)


# The process group of the writing threads, and the world that it belongs to.
_writers: tuple[Any, Any] = (None, None)


def _writers_group() -> Any:
    """All ranks, over gloo, for the writing threads alone. Collective."""
    global _writers  # noqa: PLW0603
    import torch.distributed as dist

    world, group = _writers
    if world is not dist.group.WORLD:
        group = dist.new_group(backend="gloo")
        _writers = (dist.group.WORLD, group)
    return group
