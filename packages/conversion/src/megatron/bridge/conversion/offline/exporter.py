"""Megatron distributed checkpoint -> Hugging Face folder, file by file."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial as bound
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zlib_ng.zlib_ng import crc32

from megatron.bridge.conversion.auto_bridge import AutoBridge
from megatron.bridge.conversion.entries import base_name, entry_of
from megatron.bridge.conversion.hf import HFFolderError, HFWeights, copy_companions, write_config
from megatron.bridge.conversion.hf.background_sync import BackgroundSync
from megatron.bridge.conversion.hf.names import INDEX
from megatron.bridge.conversion.hf.shard_files import ShardFile, ShardLayout, TensorSpec, lay_out
from megatron.bridge.conversion.hf.staging import StagedFolder
from megatron.bridge.conversion.low_bit.encoders import Encoder, FullPrecision, encoder_of
from megatron.bridge.conversion.offline.distcp_reader import MegatronWeights
from megatron.bridge.conversion.offline.index import configuration_faults, refuse_other_model
from megatron.bridge.conversion.offline.journal import Journal, Part, state_of
from megatron.bridge.conversion.offline.keys import refuse_named_blocks
from megatron.bridge.conversion.offline.workers import run_all
from megatron.bridge.conversion.plan import Plan, PlanItem, export_plan
from megatron.bridge.conversion.save import config_changes
from megatron.bridge.conversion.transforms import Region

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.live import Progress

MAX_SHARD_BYTES = 1e9


def offline_export_plan(bridge: AutoBridge, path: str | Path) -> tuple[Plan, MegatronWeights]:
    """The proven plan of a Megatron checkpoint, and its weights.

    Raises:
        BridgeError: a damaged checkpoint, or one of another model than the bridge's configuration describes.
    """
    what = f"export of {path}"
    with configuration_faults(what):
        table = bridge.weight_table()
        refuse_named_blocks(table.rules)
        weights = MegatronWeights(path, table)
        plan = export_plan(table, weights.shapes, what)
        refuse_other_model(plan, bridge.model_bridge, what)
    return plan, weights


def export_checkpoint(
    megatron_path: str | Path,
    hf_path: str | Path,
    *,
    hf_model: str | Path | None = None,
    workers: int = 1,
    dtype: "torch.dtype | None" = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    max_shard_bytes: float = MAX_SHARD_BYTES,
    quantization: str | None = None,
    progress: "Progress | None" = None,
) -> Path:
    """Convert a Megatron checkpoint, written at whatever layout, to a complete Hugging Face folder.

    What an interrupted call with the same arguments finished is taken over, after reading it again.

    Args:
        megatron_path: a checkpoint folder, or the root that holds it; only its weights are read.
        hf_path: the folder to make.
        hf_model: which Hugging Face model it is, for checkpoints that do not say.
        workers: files written at the same time.
        dtype: cast floating-point weights; None keeps the checkpoint's.
        trust_remote_code: run the configuration code that the model ships.
        overwrite: replace a Hugging Face folder that is there.
        max_shard_bytes: size of one weight file.
        quantization: as in `AutoBridge.save_hf_pretrained`.
        progress: called with (file, bytes) after each file.

    Raises:
        BridgeError: the checkpoint is damaged or of another model, the target exists or cannot be written.
    """
    if hf_model is None:
        bridge = AutoBridge.from_megatron_checkpoint(megatron_path, trust_remote_code=trust_remote_code)
    else:
        bridge = AutoBridge.from_hf_pretrained(hf_model, trust_remote_code=trust_remote_code)
    plan, weights = offline_export_plan(bridge, megatron_path)
    specs = _specs(plan, weights, dtype)
    encoder = encoder_of(quantization, plan, f"export of {megatron_path}")
    tensors = encoder.specs(specs)
    layouts = lay_out(tensors, max_shard_bytes)
    target = Path(hf_path).resolve()
    try:
        # The target's state is judged before a journal is left beside it.
        partial = target.with_name(f".{target.name}.offline")
        staged = StagedFolder(target, overwrite=overwrite, needed_bytes=0, path=partial)
        journal = Journal(target.with_name(f".{target.name}.journal"), _job(plan, weights, layouts))
        try:
            _Export(partial, journal, plan, weights, layouts, specs, encoder).run(workers, progress)
            changes = config_changes([dtype for _, dtype in specs.values()], encoder)
            _complete(partial, bridge, layouts, tensors, changes)
            staged.publish()
            journal.remove()
        finally:
            journal.close()
    except OSError as error:
        raise HFFolderError(f"{target} cannot be written: {error.strerror} ({error.filename})") from error
    return target


def _job(plan: Plan, weights: MegatronWeights, layouts: tuple[ShardLayout, ...]) -> dict[str, Any]:
    """All that decides the result."""
    return {
        "source": state_of(weights.files),
        "headers": [crc32(layout.header) for layout in layouts],
        "plan": [(item.megatron, item.hf, repr(item.rule.transform)) for item in plan],
    }


def _specs(plan: Plan, weights: MegatronWeights, dtype: "torch.dtype | None") -> dict[str, TensorSpec]:
    """Shape and dtype of every weight to write."""
    kept: dict[str, torch.dtype] = {}
    for item in plan:
        held = weights[item.megatron].dtype
        wanted = dtype if dtype is not None and held.is_floating_point and not item.rule.keeps_dtype else held
        kept |= {base_name(name): wanted for name in item.hf}
    return {name: (shape, kept[name]) for name, shape in plan.hf_shapes.items()}


class _Export:
    """The weight files of one export."""

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        plan: Plan,
        weights: MegatronWeights,
        layouts: tuple[ShardLayout, ...],
        specs: Mapping[str, TensorSpec],
        encoder: Encoder,
    ) -> None:
        self._folder, self._journal, self._weights, self._layouts = folder, journal, weights, layouts
        self._specs, self._encoder = specs, encoder
        # File -> the items that it holds something of, in plan order.
        self._items: dict[str, dict[str, PlanItem]] = {layout.file: {} for layout in layouts}
        file_of = {name: layout.file for layout in layouts for name in layout.tensors}
        for item in plan:
            for output in (output for name in item.hf for output in encoder.outputs(base_name(name))):
                self._items[file_of[output]][item.megatron] = item
        self._sync = BackgroundSync()

    def run(self, workers: int, progress: "Progress | None") -> None:
        """Write the files that are not finished yet."""
        if not self._journal.continues:
            shutil.rmtree(self._folder)
            self._folder.mkdir()
        todo = [layout for layout in self._layouts if self._journal.finished(self._folder, layout.file) is None]
        _refuse_small_disk(self._folder, todo)
        try:
            run_all(todo, bound(self._write, progress=progress), workers)
        except BaseException:
            self._sync.abort()
            raise
        self._sync.finish()

    def _write(self, layout: ShardLayout, progress: "Progress | None") -> None:
        shard = ShardFile(self._folder, layout)
        shard.path.unlink(missing_ok=True)
        shard.create()
        parts = [Part("header", 0, len(layout.header), crc32(layout.header))]
        for item in self._items[layout.file].values():
            parts += self._write_item(shard, item)

        def finish() -> None:
            shard.sync_and_close()
            shard.path.rename(self._folder / layout.file)
            self._journal.add(layout.file, parts)
            if progress is not None:
                progress(layout.file, layout.nbytes)

        self._sync.submit(finish)

    def _write_item(self, shard: ShardFile, item: PlanItem) -> Iterator[Part]:
        """The weights of an item that this file holds; the others are written with theirs."""
        regions = item.rule.transform.regions(item.shape)
        if regions is not None and isinstance(self._encoder, FullPrecision):
            for name, region in zip(item.hf, regions, strict=True):
                if base_name(name) in shard.layout.tensors:
                    yield from self._write_region(shard, name, item, region)
            return
        pieces = item.rule.transform.inverse(self._weights.read(item.megatron))
        for name, piece in zip(item.hf, pieces, strict=True):
            outputs = self._encoder.outputs(base_name(name))
            if any(output in shard.layout.tensors for output in outputs):
                yield from self._write_weight(shard, name, piece.to(self._specs[base_name(name)][1]))

    def _write_region(self, shard: ShardFile, name: str, item: PlanItem, region: Region) -> Iterator[Part]:
        """A weight that is a region of a Megatron weight, as it lies in the checkpoint: run by run."""
        if not region:
            yield _write_rows(shard, name, item, self._weights.read(item.megatron))
            return
        first, stop = region[0]
        for low, high in self._weights.row_runs(item.megatron, first, stop):
            rows = self._weights.read(item.megatron, ((low, high), *region[1:]))
            yield _write_rows(shard, name, item, rows, low - first)

    def _write_weight(self, shard: ShardFile, name: str, weight: "torch.Tensor") -> list[Part]:
        import torch

        parts = []
        for output, piece in self._encoder.encode(name, weight):
            written, index = entry_of(output) or (output, 0)
            stored = shard.layout.tensors.get(written)
            if stored is None:
                continue
            tensor = piece.contiguous()
            first = index * tensor.nbytes
            shard.write(written, tensor, first)
            crc = crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)
            parts.append(Part(output, len(shard.layout.header) + stored.begin + first, tensor.nbytes, crc))
        return parts


def _write_rows(shard: ShardFile, name: str, item: PlanItem, rows: "torch.Tensor", first: int = 0) -> Part:
    """Write a Hugging Face weight, or a run of its rows that begins at row `first`."""
    import torch

    weight, entry = entry_of(name) or (name, 0)
    stored = shard.layout.tensors[weight]
    tensor = rows.to(stored.dtype).contiguous()
    shape = item.hf_shapes[item.hf.index(name)]
    before = (entry * math.prod(shape) + first * math.prod(shape[1:])) * stored.dtype.itemsize
    shard.write(weight, tensor, before)
    crc = crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return Part(f"{name}@{first}", len(shard.layout.header) + stored.begin + before, tensor.nbytes, crc)


def _refuse_small_disk(folder: Path, todo: list[ShardLayout]) -> None:
    needed, free = sum(layout.nbytes for layout in todo), shutil.disk_usage(folder).free
    if free < needed:
        raise HFFolderError(
            f"{folder.parent} needs {needed / 1e9:.2f} GB more, its file system has {free / 1e9:.2f} GB free; "
            "make room or choose another folder, and start again: what is finished is kept"
        )


def _complete(
    folder: Path,
    bridge: AutoBridge,
    layouts: tuple[ShardLayout, ...],
    tensors: Mapping[str, TensorSpec],
    changes: Mapping[str, Any],
) -> None:
    """Index, companions and configuration; then the folder is read back."""
    if len(layouts) > 1:
        total = sum(layout.nbytes - len(layout.header) for layout in layouts)
        weight_map = {name: layout.file for layout in layouts for name in sorted(layout.tensors)}
        with (folder / INDEX).open("w", encoding="utf-8") as file:
            json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
    (folder / "config.json").unlink(missing_ok=True)
    if bridge.source is not None:
        copy_companions(bridge.source.folder, folder)
    write_config(folder, bridge.config_json(**changes))
    found = HFWeights(folder)
    differing = [name for name, (shape, dtype) in tensors.items() if found[name][:2] != (tuple(shape), dtype)]
    if differing or len(found) != len(tensors):
        raise HFFolderError(f"{folder} was not written as planned: {differing or sorted(found)}")
