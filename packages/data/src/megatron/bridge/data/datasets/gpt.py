"""Pretraining text: `.bin`/`.idx` pairs cut into samples by Megatron-Core's `GPTDataset`. Torch-free until built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.bridge.data.provider import DatasetBuildContext, DatasetProvider

if TYPE_CHECKING:
    from megatron.bridge.data.provider import Split


@dataclass(kw_only=True)
class GPTDatasetConfig(DatasetProvider):
    """A blend of preprocessed texts, split into train, validation and test by document.

    Attributes:
        data_paths: prefixes of `.bin`/`.idx` pairs, `["a", "b"]`, blended in proportion to their size, or with
            weights, `["0.7", "a", "0.3", "b"]`. Divided among the splits by `split`.
        train_data_paths, valid_data_paths, test_data_paths: the same for one split each, instead of `data_paths`.
        split: shares of train, validation and test; a share of 0 means that there is no such set.
        sequence_length: tokens per sample.
        random_seed: seeds the order of documents and samples.
        reset_position_ids: count positions from 0 again after each end of document.
        reset_attention_mask: keep attention within a document; samples then carry an `attention_mask`.
        eod_mask_loss: leave the token that follows an end of document out of the loss.
        path_to_cache: folder for sample indices; None takes `cache` beside the first prefix.
        mock: no files; Megatron-Core's counting sequences. None means mock data for as long as no paths are given.
    """

    data_paths: list[str] | None = None
    train_data_paths: list[str] | None = None
    valid_data_paths: list[str] | None = None
    test_data_paths: list[str] | None = None
    split: str = "99,1,0"
    sequence_length: int | None = None
    random_seed: int = 1234
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    path_to_cache: str | None = None
    mock: bool | None = False

    @property
    def uses_mock(self) -> bool:
        """Whether mock data are read, `mock=None` resolved."""
        if self.mock is not None:
            return self.mock
        return not any((self.data_paths, self.train_data_paths, self.valid_data_paths, self.test_data_paths))

    def validate(self, context: DatasetBuildContext) -> None:
        """Refuse missing or broken files, too little text and ids beyond the vocabulary. Reads indices, not data."""
        from megatron.bridge.data.datasets.gpt_sources import plan_splits

        super().validate(context)
        plan_splits(self, context)

    def build_train_valid_test_datasets(self, context: DatasetBuildContext) -> tuple[Split, Split, Split]:
        """Build the sample indices (rank 0 first, the others from its cache) and open the datasets.

        Every rank must call this. A refusal on one rank is raised on all.
        """
        from megatron.bridge.data.datasets.gpt_build import build_splits

        return build_splits(self, context)
