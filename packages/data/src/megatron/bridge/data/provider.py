"""What a dataset is to the training loop: a provider that builds the train, validation and test sets.

A provider is a small dataclass, so it is a section of the run's configuration at the same time. Others are added under
the entry-point group `megatron.bridge.datasets`. Torch-free.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron.bridge.errors import BridgeError
from megatron.bridge.registry import Registry

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from megatron.bridge.data.tokenizers import Tokenizer

    type Split = Dataset[Any] | None


@dataclass(frozen=True, kw_only=True)
class DatasetBuildContext:
    """What the run asks of its data.

    Attributes:
        train_samples, valid_samples, test_samples: how many samples the run will draw from each split; 0 means that
            the split is not wanted, None means one whole pass over it.
        tokenizer: the run's tokenizer, or None when the data are not text.
        document_multiple: what the length of a document in a packed sample must be a multiple of: twice the number of
            ranks that share a sequence, 1 where none do.
    """

    train_samples: int | None = None
    valid_samples: int | None = 0
    test_samples: int | None = 0
    tokenizer: Tokenizer | None = None
    document_multiple: int = 1

    @property
    def samples(self) -> tuple[int | None, int | None, int | None]:
        """Samples asked of train, valid and test, in that order."""
        return self.train_samples, self.valid_samples, self.test_samples


@dataclass(kw_only=True)
class DatasetProvider(ABC):
    """Builds the datasets of a run. Subclass it as a dataclass; its fields are the `dataset` section of the config.

    Attributes:
        num_workers: processes that load samples ahead of the training step; 0 loads in the training process.
        dataloader_type: `single` draws training samples in the dataset's own order, once; `cyclic` draws them in an
            order that `rng.seed` decides anew for every pass, for as long as the run lasts.
    """

    num_workers: int = 0
    dataloader_type: Literal["single", "cyclic"] = "single"

    def validate(self, context: DatasetBuildContext) -> None:
        """Refuse what cannot work, before a model is built. Cheap; no collective; needs no torch.

        Raises:
            BridgeError: names the field at fault and the remedy.
        """
        if self.num_workers < 0:
            raise BridgeError(f"dataset.num_workers={self.num_workers} must not be negative; 0 loads in this process")

    @abstractmethod
    def build_train_valid_test_datasets(self, context: DatasetBuildContext) -> tuple[Split, Split, Split]:
        """The three map-style datasets, each None when it is not wanted. Called on every rank."""


DATASETS: Registry[type[DatasetProvider]] = Registry("megatron.bridge.datasets", DatasetProvider, "dataset")
