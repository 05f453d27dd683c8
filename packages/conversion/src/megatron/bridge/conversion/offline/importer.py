"""Hugging Face folder -> Megatron distributed checkpoint, file by file."""

import os
import shutil
import tempfile
from functools import partial as bound
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion import hf_config
from megatron.bridge.conversion.auto_bridge import AutoBridge
from megatron.bridge.conversion.checkpoint_layout import (
    METADATA_FILE,
    CheckpointError,
    iteration_folder,
    write_latest_pointer,
)
from megatron.bridge.conversion.dist_checkpoint import check_files, publish, read_metadata
from megatron.bridge.conversion.entries import base_name
from megatron.bridge.conversion.hf.background_sync import BackgroundSync
from megatron.bridge.conversion.live import SourceTensor, check_ties
from megatron.bridge.conversion.megatron_checkpoint import HF_FILES, describing_files
from megatron.bridge.conversion.offline.distcp_writer import (
    FILE_BYTES,
    CheckpointFile,
    Chunk,
    chunks_of,
    lay_out,
    write_file,
    write_metadata,
)
from megatron.bridge.conversion.offline.index import configuration_faults, megatron_shapes, refuse_other_model
from megatron.bridge.conversion.offline.journal import Journal, Part, state_of
from megatron.bridge.conversion.offline.keys import extra_state_keys, places
from megatron.bridge.conversion.offline.workers import run_all
from megatron.bridge.conversion.plan import Plan, PlanItem, import_plan
from megatron.bridge.conversion.weight_source import quantization_config
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.live import Progress

_UNFINISHED = ".unfinished"
VOCAB_MULTIPLE = 128


def offline_import_plan(bridge: AutoBridge, vocab_multiple: int = VOCAB_MULTIPLE) -> Plan:
    """The proven plan of a Hugging Face folder, with the Megatron side derived from the table.

    Raises:
        PlanError: a weight is unaccounted for, or the configuration describes another model.
    """
    if bridge.source is None:
        raise BridgeError("this bridge was made from a configuration and has no weights to convert")
    what = f"import of {bridge.source.path_or_id}"
    shapes = bridge.stored_weights.shapes
    with configuration_faults(what):
        table = bridge.weight_table()
        plan = import_plan(table, shapes, megatron_shapes(table.grown(shapes), shapes, vocab_multiple, what), what)
        refuse_other_model(plan, bridge.model_bridge, what)
    return plan


def import_checkpoint(
    hf_model: str | Path,
    megatron_path: str | Path,
    *,
    workers: int = 1,
    vocab_multiple: int = VOCAB_MULTIPLE,
    dtype: "torch.dtype | None" = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    file_bytes: int = FILE_BYTES,
    progress: "Progress | None" = None,
) -> Path:
    """Convert a Hugging Face model to a Megatron checkpoint that loads at any layout; returns its folder.

    What an interrupted call with the same arguments finished is taken over, after reading it again.

    Args:
        hf_model: folder or hub id.
        megatron_path: the checkpoint's root folder.
        workers: files written at the same time.
        vocab_multiple: the vocabulary is padded to a multiple of this.
        dtype: of floating-point weights; None takes the one the configuration states.
        trust_remote_code, revision: as in `AutoBridge.from_hf_pretrained`.
        overwrite: replace a checkpoint that is there.
        file_bytes: about the size of one file; what an interruption loses is the files that were being written.
        progress: called with (file, bytes) after each file.

    Raises:
        BridgeError: the weights do not fit the family's table or configuration (nothing was written), the target
            exists or cannot be written.
    """
    bridge = AutoBridge.from_hf_pretrained(hf_model, trust_remote_code=trust_remote_code, revision=revision)
    target = iteration_folder(megatron_path, 0)
    journal_file = target.with_name(f".{target.name}.journal")
    if not overwrite and not journal_file.exists():
        _refuse_existing(target)
    plan = offline_import_plan(bridge, vocab_multiple)
    files = _files(plan, dtype or hf_config.dtype(bridge.hf_config), bridge, file_bytes)
    check_ties(plan, bridge.stored_weights, f"import of {hf_model}")
    try:
        journal = Journal(journal_file, _job(bridge, plan, files))
        try:
            _Import(bridge, target, journal, files).run(workers, overwrite, progress)
            journal.remove()
        finally:
            journal.close()
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror} ({error.filename})") from error
    return target


def _job(bridge: AutoBridge, plan: Plan, files: list[CheckpointFile]) -> dict[str, Any]:
    """All that decides the result."""
    weights = bridge.source.weights  # type: ignore[union-attr]
    return {
        "source": state_of([weights.folder / name for name in weights.files]),
        "quantization": quantization_config(bridge.source),  # type: ignore[arg-type]
        "files": [[file.name, [f"{chunk.label}:{chunk.dtype}" for chunk in file.chunks]] for file in files],
        "plan": [(item.megatron, item.hf, repr(item.rule.transform)) for item in plan],
    }


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise CheckpointError(f"{target} exists; choose another folder, remove it, or ask for it to be overwritten")


def _files(plan: Plan, dtype: "torch.dtype", bridge: AutoBridge, file_bytes: int) -> list[CheckpointFile]:
    found = places(plan)
    held = bridge.stored_weights.dtypes
    chunks: list[Chunk] = []
    for item in plan:
        stored = held[base_name(item.hf[0])]
        chunks += chunks_of(item, found[item.megatron], _dtype(item, stored, dtype))
    of_core = (found[item.megatron] for item in plan if item.rule.tree is None)
    objects: dict[str, Any] = dict.fromkeys(extra_state_keys(of_core))
    return lay_out(chunks, objects | {"common_state/shard_0_1": {}}, file_bytes)


def _dtype(item: PlanItem, stored: "torch.dtype", wanted: "torch.dtype") -> "torch.dtype":
    """What Megatron-Core holds the weight in."""
    import torch

    if item.rule.keeps_dtype:
        return torch.float32
    return wanted if stored.is_floating_point else stored


class _Import:
    """The files of one import: made in a hidden folder beside the target, then given its name."""

    def __init__(self, bridge: AutoBridge, target: Path, journal: Journal, files: list[CheckpointFile]) -> None:
        self._bridge, self._target, self._journal, self._files = bridge, target, journal, files
        self._partial = target.with_name(f".{target.name}.offline")
        self._source = bridge.stored_weights
        self._sync = BackgroundSync()
        self._done: dict[str, list[Part]] = {}

    def run(self, workers: int, overwrite: bool, progress: "Progress | None") -> None:
        """Do what is not done yet."""
        if self._is_published():
            write_latest_pointer(self._target.parent, 0)
            return
        if not overwrite:
            _refuse_existing(self._target)
        self._write(workers, progress)
        _complete(self._partial, self._bridge)
        publish(self._partial, self._target, 0)

    def _is_published(self) -> bool:
        """Whether the last attempt was cut off after its folder got its name, and before the pointer was written."""
        whole = self._journal.continues and (self._target / METADATA_FILE).is_file()
        return whole and all(self._journal.finished(self._target, file.name) is not None for file in self._files)

    def _write(self, workers: int, progress: "Progress | None") -> None:
        """Every file and the metadata, into the hidden folder."""
        if not self._journal.continues and self._partial.exists():
            shutil.rmtree(self._partial)
        self._partial.mkdir(parents=True, exist_ok=True)
        for file in self._files:
            if (parts := self._journal.finished(self._partial, file.name)) is not None:
                self._done[file.name] = parts
        todo = [file for file in self._files if file.name not in self._done]
        _refuse_small_disk(self._partial, todo)
        try:
            run_all(todo, bound(self._write_file, progress=progress), workers)
        except BaseException:
            self._sync.abort()
            raise
        self._sync.finish()
        write_metadata(self._partial, self._files, self._done)

    def _write_file(self, file: CheckpointFile, progress: "Progress | None") -> None:
        unfinished = self._partial / f"{file.name}{_UNFINISHED}"
        parts = write_file(unfinished, file, self._read)

        def finish() -> None:
            with unfinished.open("rb") as stream:
                os.fsync(stream.fileno())
            unfinished.rename(self._partial / file.name)
            self._journal.add(file.name, parts)
            self._done[file.name] = parts
            if progress is not None:
                progress(file.name, sum(part.length for part in parts))

        self._sync.submit(finish)

    def _read(self, chunk: Chunk) -> "torch.Tensor":
        item = chunk.item
        inputs = [SourceTensor(self._source, *pair) for pair in zip(item.hf, item.hf_shapes, strict=True)]
        return item.rule.transform.forward(inputs, chunk.region)


def _refuse_small_disk(folder: Path, files: list[CheckpointFile]) -> None:
    needed = sum(chunk.nbytes for file in files for chunk in file.chunks)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder.parent} needs {needed / 1e9:.2f} GB more, its file system has {free / 1e9:.2f} GB free; "
            "make room or choose another folder, and start again: what is finished is kept"
        )


def _complete(partial: Path, bridge: AutoBridge) -> None:
    """Add the Hugging Face files, and see that the checkpoint is whole."""
    shutil.rmtree(partial / HF_FILES, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(describing_files(bridge, Path(scratch)), partial / HF_FILES)
    for left_over in partial.glob(f"*{_UNFINISHED}"):
        left_over.unlink()
    check_files(partial, read_metadata(partial))
