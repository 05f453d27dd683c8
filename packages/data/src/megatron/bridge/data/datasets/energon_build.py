"""Opens energon's datasets and loads them, one data-parallel rank at a time. Imports megatron.energon."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset, get_val_dataset
from megatron.energon.errors import reraise_exception

from megatron.bridge.data.datasets.energon_text import TextEncoder
from megatron.bridge.data.loaders import OutOfSamples
from megatron.bridge.data.streamed import LoaderPlace, StreamedBatches, StreamedDataset
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.data.datasets.energon import EnergonDatasetConfig
    from megatron.bridge.data.provider import DatasetBuildContext, Split

_SPLITS = ("train", "val", "test")
_FIELDS = ("tokens", "labels", "loss_mask", "position_ids")
_OPTIONAL = ("attention_mask", "cu_seqlens", "modality_inputs")


def build_splits(config: EnergonDatasetConfig, context: DatasetBuildContext) -> tuple[Split, Split, Split]:
    """The wanted splits."""
    encoder = _encoder(config, context)
    wanted = [samples is None or samples > 0 for samples in context.samples]
    train, valid, test = (
        EnergonSplit(config, name, encoder) if asked else None for name, asked in zip(_SPLITS, wanted, strict=True)
    )
    return train, valid, test  # type: ignore[return-value]


def _encoder(config: EnergonDatasetConfig, context: DatasetBuildContext) -> Any:
    assert config.sequence_length is not None
    if config.task_encoder is None:
        return TextEncoder(sequence_length=config.sequence_length, tokenizer=context.tokenizer)
    module, _, name = config.task_encoder.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
        return kind(sequence_length=config.sequence_length, tokenizer=context.tokenizer, **config.task_encoder_options)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise BridgeError(
            f"dataset.task_encoder={config.task_encoder!r} cannot be made: {error}; write it as module:Class, of "
            "a class that is called with sequence_length, tokenizer and task_encoder_options"
        ) from error


@dataclass(frozen=True)
class EnergonSplit(StreamedDataset):
    """One split; opened anew for every place."""

    config: EnergonDatasetConfig
    name: str
    encoder: Any

    def batches(self, place: LoaderPlace) -> EnergonBatches:
        """See `StreamedDataset.batches`.

        Raises:
            BridgeError: energon cannot open the split.
        """
        workers = WorkerConfig(
            rank=place.dp_rank,
            world_size=place.dp_size,
            num_workers=self.config.num_workers,
            seed_offset=self.config.random_seed,
            # A sample that cannot be read ends the run; energon would leave it out and go on.
            global_error_handler=reraise_exception,
        )
        shared = {"worker_config": workers, "batch_size": place.micro_batch_size, "batch_drop_last": True}
        try:
            dataset = self._open(shared)
        except Exception as error:  # energon raises whatever its parsers raise
            raise BridgeError(
                f"energon cannot open the split {self.name!r} of {self.config.path!r}: {type(error).__name__}: {error}"
            ) from error
        return EnergonBatches(get_savable_loader(dataset), self)

    def _open(self, shared: dict[str, Any]) -> Any:
        if self.name == "train":
            return get_train_dataset(
                self.config.path,
                shuffle_buffer_size=self.config.shuffle_buffer_size,
                max_samples_per_sequence=self.config.max_samples_per_sequence,
                task_encoder=self.encoder,
                **shared,
            )
        return get_val_dataset(self.config.path, split_part=self.name, task_encoder=self.encoder, **shared)


class EnergonBatches(StreamedBatches):
    """What energon's savable loader yields, as a forward step reads it."""

    def __init__(self, loader: Any, split: EnergonSplit) -> None:
        self._loader, self._split = loader, split
        self._batches: Iterator[Any] | None = None

    def __next__(self) -> dict[str, Tensor]:
        if self._batches is None:
            self._batches = iter(self._loader)
        try:
            return _checked(next(self._batches))
        except StopIteration:
            raise OutOfSamples(
                f"the split {self._split.name!r} of {self._split.config.path!r} holds no further micro-batch; lower "
                "train.eval_iters, or add data"
            ) from None

    def state_dict(self) -> bytes:
        """Energon's own state of this rank's loader."""
        return pickle.dumps(self._loader.save_state_rank())

    def load_state_dict(self, state: bytes) -> None:
        """See `StreamedBatches`.

        Raises:
            BridgeError: energon refuses the state, e.g. because the number of workers is another.
        """
        try:
            self._loader.restore_state_rank(pickle.loads(state))
        except (AssertionError, ValueError, TypeError, KeyError) as error:
            raise BridgeError(
                f"energon cannot go on from the state in the checkpoint: {error}; keep dataset.num_workers and "
                "train.micro_batch_size as they were"
            ) from error


def _checked(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch that the model takes, by name."""
    found = batch if isinstance(batch, dict) else vars(batch)
    absent = [name for name in _FIELDS if not isinstance(found.get(name), torch.Tensor)]
    if absent:
        raise BridgeError(
            f"the task encoder's batches lack {', '.join(absent)}; they have {', '.join(map(repr, found)) or 'nothing'}"
        )
    return {name: found[name] for name in (*_FIELDS, *_OPTIONAL) if found.get(name) is not None}
