"""Writing the weights of a Hugging Face folder as a stream: whole in the end, or not there at all."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from threading import Condition
from types import TracebackType
from typing import Self

import torch

from megatron.bridge.conversion.hf.background_sync import BackgroundSync
from megatron.bridge.conversion.hf.errors import HFFolderError, listing
from megatron.bridge.conversion.hf.names import INDEX
from megatron.bridge.conversion.hf.shard_files import ShardFile, TensorSpec, lay_out
from megatron.bridge.conversion.hf.staging import StagedFolder
from megatron.bridge.conversion.hf.weights import HFWeights
from megatron.bridge.errors import did_you_mean

# What each process wrote, for the one that finishes; removed then.
_RECORDS = ".written"


class HFFolderWriter:
    """Writes tensors, known by name, shape and dtype beforehand, to a new Hugging Face folder.

    Everything goes to `partial`, a hidden folder beside the target; `finish()` proves it whole and renames it. Until
    then `partial` takes the companion files too (`copy_companions(source, writer.partial)`). As a context manager it
    finishes at the end of the block and removes everything when an exception leaves it.

    Several processes may fill one folder: one opens it and tells the others its `partial`; they open the same writer
    with `partial=`, each writes its tensors (best: whole files, see `files_of`) and calls `close()`; after that the
    first one finishes.

    Args:
        folder: the target, which must not exist unless `overwrite`.
        tensors: name -> (shape, dtype) of every tensor, in the order that decides the shards.
        max_shard_bytes: a file is closed before it holds more bytes of tensors than this.
        overwrite: replace a Hugging Face folder that is there, at the moment of finishing.
        partial: fill the folder that another process opened, instead of opening one.

    Raises:
        HFFolderError: the target exists or cannot be written, there is not enough room, or a tensor cannot be held.
    """

    def __init__(
        self,
        folder: str | Path,
        tensors: Mapping[str, TensorSpec],
        max_shard_bytes: float = 5e9,
        overwrite: bool = False,
        *,
        partial: str | Path | None = None,
    ) -> None:
        layouts = lay_out(tensors, max_shard_bytes)
        self.folder = Path(folder)
        self._staged: StagedFolder | None = None
        if partial is None:
            needed = sum(layout.nbytes for layout in layouts)
            self._staged = StagedFolder(self.folder, overwrite=overwrite, needed_bytes=needed)
        self.partial = Path(partial) if self._staged is None else self._staged.path  # type: ignore[arg-type]
        self._shards = {layout.file: ShardFile(self.partial, layout) for layout in layouts}
        self._shard_of = {name: shard for shard in self._shards.values() for name in shard.layout.tensors}
        self._order = tuple(tensors)
        # Claimed before it is written, so that no two threads write the same.
        self._claimed: set[str] = set()
        self._written: set[str] = set()
        self._unwritten = {file: len(shard.layout.tensors) for file, shard in self._shards.items()}
        self._sync = BackgroundSync()
        self._changed = Condition()
        self._open = True
        self._prepare()

    @property
    def files(self) -> tuple[str, ...]:
        """The weight files that will be there, by their final names."""
        return tuple(self._shards)

    def files_of(self, rank: int, world: int) -> tuple[str, ...]:
        """The weight files that process `rank` of `world` should write: no two processes have one in common."""
        return self.files[rank::world]

    def tensors_of(self, file: str) -> tuple[str, ...]:
        """The tensors that a weight file holds, in the order they lie in it."""
        return tuple(self._shards[file].layout.tensors)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place. Any order, any device, any thread.

        Raises:
            HFFolderError: an unknown name, another shape or dtype than announced, a second write, or a full disk.
        """
        shard = self._claim(name, tensor)
        try:
            shard.write(name, tensor)
            self._wrote(shard, name)
        except BaseException as error:
            # Whoever goes on regardless is told at the end that the tensor is missing.
            with self._changed:
                self._claimed.discard(name)
                self._changed.notify_all()
            if isinstance(error, OSError):
                raise HFFolderError(f"{name!r} cannot be written to {shard.path}: {error.strerror}") from error
            raise

    def close(self) -> None:
        """Bring this process's files to disk and record what it wrote, for the process that finishes."""
        if not self._open:
            return
        self._stop_writing()
        try:
            self._sync.finish()
            for shard in self._shards.values():
                shard.sync_and_close()
            if self._staged is None:
                record = self.partial / _RECORDS / f"{secrets.token_hex(8)}.json"
                record.with_suffix(".tmp").write_text(json.dumps(sorted(self._written)))
                record.with_suffix(".tmp").rename(record)
        except OSError as error:
            raise HFFolderError(f"{self.folder} cannot be brought to disk: {error.strerror}") from error

    def finish(self) -> Path:
        """Prove that every tensor was written, write the index, and rename `partial` to the target.

        Raises:
            HFFolderError: naming the tensors that are missing, or that two processes wrote; everything is removed.
        """
        if self._staged is None:
            raise HFFolderError(f"{self.partial} was opened by another process, which must finish it; close() here")
        if not self._open:
            raise HFFolderError(f"the writer of {self.folder} is already finished or aborted")
        try:
            self.close()
            self._check_complete()
            for shard in self._shards.values():
                shard.path.rename(self.partial / shard.layout.file)
            self._write_index()
            self._check_readable()
            self._staged.publish()
        except BaseException as error:
            self.abort()
            if isinstance(error, OSError):
                raise HFFolderError(f"{self.folder} cannot be finished: {error.strerror} ({error.filename})") from error
            raise
        return self._staged.target

    def abort(self) -> None:
        """Remove everything that was written (in the process that opened the folder) and leave no trace."""
        self._stop_writing()
        self._sync.abort()
        for shard in self._shards.values():
            shard.close()
        if self._staged is not None:
            self._staged.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif self._open:
            if self._staged is None:
                self.close()
            else:
                self.finish()

    def _prepare(self) -> None:
        try:
            if self._staged is None:
                for shard in self._shards.values():
                    shard.check()
                return
            (self.partial / _RECORDS).mkdir()
            for shard in self._shards.values():
                shard.create()
        except BaseException as error:
            self.abort()
            if isinstance(error, OSError):
                raise HFFolderError(f"{self.folder} cannot be written: {error.strerror} ({error.filename})") from error
            raise

    def _claim(self, name: str, tensor: torch.Tensor) -> ShardFile:
        shard = self._shard_of.get(name)
        if shard is None:
            raise HFFolderError(f"{self.folder} was not announced a tensor {name!r}{did_you_mean(name, self._order)}")
        shape, dtype, *_ = shard.layout.tensors[name]
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise HFFolderError(
                f"{name!r} was announced to {self.folder} as {dtype} {list(shape)}, "
                f"what came is {tensor.dtype} {list(tensor.shape)}"
            )
        with self._changed:
            if not self._open:
                raise HFFolderError(f"the writer of {self.folder} is closed; {name!r} comes too late")
            if name in self._claimed:
                raise HFFolderError(f"{name!r} was already written to {self.folder}")
            self._claimed.add(name)
        return shard

    def _wrote(self, shard: ShardFile, name: str) -> None:
        file, stored = shard.layout.file, shard.layout.tensors[name]
        with self._changed:
            self._unwritten[file] -= 1
            complete = self._unwritten[file] == 0
        if complete:
            # Not at the end: a large checkpoint has more files than a process may have open.
            self._sync.submit(shard.sync_and_close)
        else:
            self._sync.wrote(stored.end - stored.begin, shard.sync)
        with self._changed:
            self._written.add(name)
            self._changed.notify_all()

    def _stop_writing(self) -> None:
        """Take no more tensors, and wait for the threads that are in the middle of one."""
        with self._changed:
            self._open = False
            self._changed.wait_for(lambda: self._claimed == self._written)

    def _check_complete(self) -> None:
        written = set(self._written)
        twice: set[str] = set()
        for record in (self.partial / _RECORDS).iterdir():
            theirs = set(json.loads(record.read_text())) if record.suffix == ".json" else set()
            twice |= written & theirs
            written |= theirs
            record.unlink()
        (self.partial / _RECORDS).rmdir()
        if twice:
            raise HFFolderError(f"two processes wrote the same tensors to {self.folder}:{listing(sorted(twice))}")
        missing = [name for name in self._order if name not in written]
        if missing:
            raise HFFolderError(
                f"{self.folder} is not written: {len(missing)} of {len(self._order)} tensors never came:"
                f"{listing(missing)}"
            )

    def _write_index(self) -> None:
        if len(self._shards) == 1:
            return
        layouts = [shard.layout for shard in self._shards.values()]
        total = sum(layout.nbytes - len(layout.header) for layout in layouts)
        weight_map = {name: layout.file for layout in layouts for name in sorted(layout.tensors)}
        with (self.partial / INDEX).open("w", encoding="utf-8") as file:
            json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())

    def _check_readable(self) -> None:
        found = HFWeights(self.partial)
        differing = sorted(
            name
            for name in found.keys() | self._shard_of.keys()
            if name not in found
            or name not in self._shard_of
            or found[name][:2] != self._shard_of[name].layout.tensors[name][:2]
        )
        if differing:
            raise HFFolderError(f"{self.folder} was not written as announced:{listing(differing)}")
