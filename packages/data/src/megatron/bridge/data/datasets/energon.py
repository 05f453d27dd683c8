"""Shards of megatron-energon (webdatasets, blends of them). Torch-free until built."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.data.provider import DatasetBuildContext, DatasetProvider
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.data.provider import Split


@dataclass(kw_only=True)
class EnergonDatasetConfig(DatasetProvider):
    """A dataset that `energon prepare` made, or a metadataset of several; loaded by energon, its state in checkpoints.

    A run that goes on needs the same number of data-parallel ranks and of workers; energon divides shards among them.

    Attributes:
        path: the folder with `.nv-meta`, or a metadataset's YAML file.
        sequence_length: tokens per sample.
        task_encoder: `module:Class` of an energon `TaskEncoder` that makes batches of `tokens`, `labels`, `loss_mask`
            and `position_ids`, `[micro batch, sequence]`, and perhaps of `modality_inputs` and `cu_seqlens` for
            models of several modules; it is called with `sequence_length` and `tokenizer`. None takes one for energon's
            `TextSample`, which cuts documents into samples and loses no token.
        task_encoder_options: further arguments of the task encoder, by name.
        shuffle_buffer_size: samples among which the next one is drawn; None for the order of the shards.
        max_samples_per_sequence: samples that are read from one place before another one is gone to; None for no limit.
        random_seed: of the order.
    """

    path: str | None = None
    sequence_length: int | None = None
    task_encoder: str | None = None
    task_encoder_options: dict[str, Any] = field(default_factory=dict)
    shuffle_buffer_size: int | None = 1000
    max_samples_per_sequence: int | None = 100
    random_seed: int = 1234

    def validate(self, context: DatasetBuildContext) -> None:
        """Refuse what is absent: energon, the dataset, the length of sequences, the task encoder."""
        super().validate(context)
        if importlib.util.find_spec("megatron.energon") is None:
            raise BridgeError(
                "the dataset 'energon' needs megatron-energon: uv pip install 'megatron-bridge-data[energon]'"
            )
        if self.path is None:
            raise BridgeError("dataset.path is not set; name a folder that `energon prepare` made, or a metadataset")
        _check_path(Path(self.path))
        if self.sequence_length is None or self.sequence_length < 1:
            raise BridgeError(f"dataset.sequence_length={self.sequence_length} must be at least 1")
        if self.dataloader_type != "single":
            raise BridgeError(
                "dataset.dataloader_type='cyclic' is for datasets whose samples have numbers; energon repeats its own"
            )
        if self.task_encoder is None and self.task_encoder_options:
            raise BridgeError("dataset.task_encoder_options are for a task encoder of one's own; set task_encoder")
        if self.task_encoder is None and context.tokenizer is None:
            raise BridgeError("energon's text samples need a tokenizer; set the tokenizer section")

    def build_train_valid_test_datasets(self, context: DatasetBuildContext) -> tuple[Split, Split, Split]:
        """The splits `train`, `val` and `test` of the dataset, each None when it is not wanted."""
        from megatron.bridge.data.datasets.energon_build import build_splits

        return build_splits(self, context)


def _check_path(path: Path) -> None:
    if not path.exists():
        raise BridgeError(f"dataset.path={str(path)!r} does not exist")
    if path.is_dir() and not (path / ".nv-meta" / "dataset.yaml").is_file():
        raise BridgeError(f"dataset.path={str(path)!r} is not prepared; run `energon prepare {path}`")
    if path.is_file() and path.suffix not in (".yaml", ".yml"):
        raise BridgeError(f"dataset.path={str(path)!r} is neither a prepared folder nor a metadataset's YAML file")
