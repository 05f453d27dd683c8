"""Images and texts of a Hugging Face dataset on disk, for a model that sees. Torch-free until built."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.data.arrow_files import SavedRows
from megatron.bridge.data.provider import DatasetBuildContext, DatasetProvider
from megatron.bridge.data.splits import SPLIT_NAMES, parse_split
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.image_text import ImageText

if TYPE_CHECKING:
    from megatron.bridge.data.provider import Split


@dataclass(kw_only=True)
class ImageTextDatasetConfig(ImageText, DatasetProvider):
    """What `Dataset.save_to_disk` has written: a column of images, one of answers, perhaps one of questions.

    A row is read when it is drawn. Each pass has an order of its own.

    Attributes:
        path: folder of the dataset.
        image_column: of Hugging Face's `Image` feature.
        question_column: of text; None for captions.
        answer_column: of text; it is trained.
        sequence_length: tokens per sample.
        split: shares of train, validation and test. Which row goes where depends on nothing but how many there are.
        packed: several rows per sample (see `PackedSamples`).
        random_seed: of the order of packed samples.
    """

    dataloader_type: Any = "cyclic"
    path: str | None = None
    image_column: str = "image"
    question_column: str | None = None
    answer_column: str = "text"
    sequence_length: int | None = None
    split: str = "99,1,0"
    packed: bool = False
    random_seed: int = 1234

    @property
    def texts(self) -> list[str]:
        """The columns of text."""
        return [name for name in (self.question_column, self.answer_column) if name is not None]

    def rows(self, *, images: bool = True) -> SavedRows:
        """The rows of all splits.

        Raises:
            BridgeError: the dataset or a column is absent.
        """
        if self.path is None:
            raise BridgeError("dataset.path is not set; name a folder that Dataset.save_to_disk has written")
        return SavedRows(Path(self.path), [self.image_column, *self.texts] if images else self.texts)

    def validate(self, context: DatasetBuildContext) -> None:
        """Refuse what is absent: dataset, columns, tokenizer, the length of sequences, the processor's name."""
        super().validate(context)
        if importlib.util.find_spec("PIL") is None:
            raise BridgeError("images need the package pillow: uv pip install 'megatron-bridge-mimo[images]'")
        parse_split(self.split)
        if problems := self.problems():
            raise BridgeError("; ".join(f"dataset.{problem}" for problem in problems))
        if self.sequence_length is None or self.sequence_length < 1:
            raise BridgeError(f"dataset.sequence_length={self.sequence_length} must be at least 1")
        if context.tokenizer is None:
            raise BridgeError("images with texts need a tokenizer; set the tokenizer section")
        self.rows()

    def build_train_valid_test_datasets(self, context: DatasetBuildContext) -> "tuple[Split, Split, Split]":
        """The wanted splits."""
        from megatron.bridge.mimo.image_text_samples import build_split

        shares = parse_split(self.split)
        train, valid, test = (
            build_split(self, context, shares, split) if asked != 0 and shares[split] > 0 else None
            for split, asked in zip(range(len(SPLIT_NAMES)), context.samples, strict=True)
        )
        return train, valid, test
