"""Writes a model spread over ranks to one complete Hugging Face folder."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron.bridge import platform
from megatron.bridge.conversion.hf import HFFolderWriter, copy_companions, write_config
from megatron.bridge.conversion.live import Model
from megatron.bridge.conversion.live_export import Exporter
from megatron.bridge.conversion.low_bit.encoders import Encoder, encoder_of
from megatron.bridge.conversion.progress import tracked
from megatron.bridge.conversion.rank_agreement import gather, on_every_rank, on_rank_zero
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.auto_bridge import AutoBridge
    from megatron.bridge.conversion.dtype_policy import DtypePolicy
    from megatron.bridge.conversion.plan import Plan
    from megatron.bridge.conversion.transforms import Shape

# Weights gathered in one go: enough that the number of small weights does not matter.
_BUCKET_BYTES = 64 * 2**20


def save_hf_folder(
    bridge: "AutoBridge",
    model: Model,
    path: Path,
    *,
    companions: bool,
    overwrite: bool = False,
    show_progress: bool = False,
    dtype: "DtypePolicy" = None,
    distributed_save: bool = True,
    max_shard_bytes: float = 5e9,
    quantization: str | None = None,
) -> Path:
    """See `AutoBridge.save_hf_pretrained`. Collective."""
    exporter = Exporter(model, bridge.weight_table(), f"export to {path}", dtype=dtype)
    return save_export(
        bridge,
        exporter,
        path,
        companions=companions,
        overwrite=overwrite,
        show_progress=show_progress,
        distributed_save=distributed_save,
        max_shard_bytes=max_shard_bytes,
        quantization=quantization,
    )


class Export(Protocol):
    """A model's Hugging Face weights, in an order that is the same on every rank: `Exporter`, or like it."""

    @property
    def plan(self) -> "Plan": ...

    @property
    def hf_shapes(self) -> "Mapping[str, Shape]": ...

    @property
    def dtypes(self) -> "Mapping[str, torch.dtype]": ...

    def stream(self, bucket_bytes: int) -> "Iterator[Mapping[str, torch.Tensor]]": ...


def save_export(
    bridge: "AutoBridge",
    exporter: Export,
    path: Path,
    *,
    companions: bool = True,
    overwrite: bool = False,
    show_progress: bool = False,
    distributed_save: bool = True,
    max_shard_bytes: float = 5e9,
    quantization: str | None = None,
) -> Path:
    """`save_hf_folder` of what an export gives. Collective over the world."""
    # Not every export has one plan, and full precision needs none.
    encoder = encoder_of(quantization, () if quantization is None else exporter.plan, f"export to {path}")
    dtypes = exporter.dtypes
    tensors = {name: (shape, dtypes[name]) for name, shape in exporter.hf_shapes.items()}
    written = encoder.specs(tensors)
    writer = _open_together(path, written, max_shard_bytes, overwrite)
    try:
        _write_share(writer, exporter, encoder, distributed_save, show_progress)
        changes = config_changes(dtypes.values(), encoder)
        on_rank_zero(lambda: _finish(writer, bridge, changes, companions), f"export to {path} failed")
    except BaseException:
        writer.abort()
        raise
    return path


def _open_together(path: Path, tensors: Any, max_shard_bytes: float, overwrite: bool) -> HFFolderWriter:
    """Rank 0 opens the folder, the others join it."""
    writer = None

    def open_first() -> None:
        nonlocal writer
        writer = HFFolderWriter(path, tensors, max_shard_bytes, overwrite)

    on_rank_zero(open_first, f"export to {path} failed")
    partial = gather(None if writer is None else str(writer.partial))[0]
    if writer is None:
        writer = HFFolderWriter(path, tensors, max_shard_bytes, partial=partial)
    return writer


def _write_share(
    writer: HFFolderWriter,
    exporter: Export,
    encoder: Encoder,
    distributed: bool,
    show_progress: bool,
) -> None:
    rank, world = platform.rank(), platform.world_size()
    files = writer.files_of(rank, world) if distributed else (writer.files if rank == 0 else ())
    mine = {name for file in files for name in writer.tensors_of(file)}
    # Every rank takes part in the gathering of every weight, so a failed write is kept until all are through.
    failure: Exception | None = None
    weights = (pair for bucket in exporter.stream(_BUCKET_BYTES) for pair in bucket.items())
    for name, tensor in tracked(weights, len(exporter.hf_shapes), "export", shown=show_progress):
        outputs = encoder.outputs(name)
        if failure is None and not mine.isdisjoint(outputs):
            try:
                for output, part in encoder.encode(name, tensor):
                    if output in mine:
                        writer.write(output, part)
            except Exception as error:
                failure = error

    def close() -> None:
        if failure is not None:
            raise failure
        if rank != 0:
            writer.close()

    on_every_rank(close, f"export to {writer.folder} failed", BridgeError)


def _finish(writer: HFFolderWriter, bridge: "AutoBridge", changes: Mapping[str, Any], companions: bool) -> None:
    if companions and bridge.source is not None:
        copy_companions(bridge.source.folder, writer.partial)
    write_config(writer.partial, bridge.config_json(**changes))
    writer.finish()


def config_changes(dtypes: "Iterable[torch.dtype]", encoder: Encoder) -> dict[str, Any]:
    """What `config.json` says about precision, given the dtypes of the weights before they are quantised."""
    floating = {held for held in dtypes if held.is_floating_point}
    # Weights of several precisions (a policy per tensor) leave the configuration's statement as it was.
    changes: dict[str, Any] = {"dtype": str(floating.pop()).removeprefix("torch.")} if len(floating) == 1 else {}
    return changes | encoder.config
