"""Rows with an image and a text as samples, one by one or packed. Imports torch."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from megatron.bridge.data.datasets.sft_build import members_of_split
from megatron.bridge.data.splits import SPLIT_NAMES
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.data import collate
from megatron.bridge.mimo.image_text import filled_up
from megatron.bridge.mimo.packed_samples import PackedSamples

if TYPE_CHECKING:
    from PIL.Image import Image

    from megatron.bridge.data.provider import DatasetBuildContext
    from megatron.bridge.mimo.image_text_dataset import ImageTextDatasetConfig


def build_split(
    config: "ImageTextDatasetConfig", context: "DatasetBuildContext", shares: tuple[float, float, float], split: int
) -> Dataset[Any]:
    """The samples of one split.

    Raises:
        BridgeError: the split has no row, or a row that is packed is too long.
    """
    members = members_of_split(np.arange(len(config.rows())), shares, split)
    if len(members) == 0:
        raise BridgeError(
            f"dataset.split={config.split!r} leaves no row for {SPLIT_NAMES[split]}; give it a larger share, or "
            "more rows"
        )
    samples = ImageTextSamples(config, context.tokenizer, members)
    if not config.packed:
        return samples
    assert config.sequence_length is not None
    return PackedSamples(
        samples,
        config.sequence_length,
        lengths=samples.lengths(),
        seed=config.random_seed,
        pad=samples.pad,
        multiple=context.document_multiple,
    )


class ImageTextSamples(Dataset[dict[str, Any]]):
    """One row per sample, filled up to one length unless it is to be packed.

    Args:
        config: of the dataset.
        tokenizer: of the run.
        members: the rows of this split.
    """

    collate = staticmethod(collate)

    def __init__(self, config: "ImageTextDatasetConfig", tokenizer: Any, members: NDArray[np.int64]) -> None:
        self._config, self._tokenizer, self._members = config, tokenizer, members
        self._rows = config.rows()
        self.pad = int(tokenizer.eod)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> dict[str, Any]:
        config, number = self._config, int(self._members[index])
        row, origin = self._rows[number], f"row {number} of {config.path!r}"
        assert config.sequence_length is not None
        question, answer = self._texts(row)
        image = opened(row[config.image_column], origin)
        sample = config.sample(self._tokenizer, image, question, answer, longest=config.sequence_length, origin=origin)
        return sample if config.packed else filled_up(sample, config.sequence_length, self.pad)

    def lengths(self) -> Sequence[int] | None:
        """Tokens of each sample, told from the texts; None where images must be seen for it."""
        assert self._config.sequence_length is not None
        texts, longest = self._config.rows(images=False), self._config.sequence_length
        found = []
        for number in self._members:
            length = self._config.length(self._tokenizer, *self._texts(texts[int(number)]))
            if length is None:
                return None
            found.append(min(length, longest) if self._config.truncation == "right" else length)
        return found

    def _texts(self, row: dict[str, Any]) -> tuple[str, str]:
        asked = self._config.question_column
        return "" if asked is None else row[asked], row[self._config.answer_column]


def opened(stored: Any, origin: str) -> "Image":
    """An image as Hugging Face's `Image` feature stores it.

    Raises:
        BridgeError: it is stored otherwise, or cannot be read.
    """
    import PIL.Image

    if not isinstance(stored, dict) or not stored.keys() & {"bytes", "path"}:
        raise BridgeError(
            f"{origin} has no image as Hugging Face's Image feature stores it; cast the column to Image()"
        )
    data = stored.get("bytes")
    try:
        return PIL.Image.open(stored["path"] if data is None else io.BytesIO(data))
    except (OSError, KeyError, AttributeError) as error:
        raise BridgeError(
            f"{origin}: the image cannot be read: {error}; store it in the dataset, or leave it out"
        ) from error
