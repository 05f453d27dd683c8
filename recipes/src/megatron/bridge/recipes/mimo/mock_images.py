"""Mock samples with images, of the sizes that a real model takes: for smoke tests, and to see how fast a layout is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from megatron.bridge.data.provider import DatasetBuildContext, DatasetProvider
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo import collate


class _Samples(Dataset[Any]):
    collate = staticmethod(collate)

    def __init__(self, config: "MockImages", count: int, first: int) -> None:
        self.config, self.count, self.first = config, count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        config, draw = self.config, torch.Generator().manual_seed(self.first + index)
        length, seen = config.sequence_length, config.images * config.tokens_per_image
        tokens = torch.randint(0, config.text_tokens, (length + 1,), generator=draw)
        tokens[1 : 1 + seen] = config.image_token_id
        labels = tokens[1:]
        is_text = labels != config.image_token_id
        inputs = {
            name: torch.randn(config.images * shape[0], *shape[1:], generator=draw)
            for name, shape in config.inputs.items()
        }
        if config.grid is not None:
            inputs["image_grid_thw"] = torch.tensor([config.grid] * config.images)
        return {
            "tokens": tokens[:-1],
            "labels": labels * is_text,
            "loss_mask": is_text.float(),
            "position_ids": torch.arange(length),
            "modality_inputs": {"images": {**inputs, "items": torch.tensor(config.images)}},
        }


@dataclass(kw_only=True)
class MockImages(DatasetProvider):
    """Random images behind the first token of a random text, which is what is trained.

    Attributes:
        sequence_length: tokens of a sample, those of its images included.
        text_tokens: text is drawn from the ids below this one.
        image_token_id: stands for one feature.
        tokens_per_image: features of an image.
        inputs: name -> shape of what the encoder takes of one image.
        grid: of an image's patches in time, height and width, for encoders that take images of any size.
        images: in each sample.
        samples: of the training split.
    """

    sequence_length: int
    text_tokens: int
    image_token_id: int
    tokens_per_image: int
    inputs: Mapping[str, tuple[int, ...]]
    grid: tuple[int, int, int] | None = None
    images: int = 1
    samples: int = 1_000_000

    def build_train_valid_test_datasets(self, context: DatasetBuildContext) -> Any:
        if self.images * self.tokens_per_image >= self.sequence_length:
            raise BridgeError(
                f"{self.images} images of {self.tokens_per_image} tokens leave no text in dataset.sequence_length="
                f"{self.sequence_length}; set it higher"
            )
        return _Samples(self, self.samples, 0), _Samples(self, 1000, self.samples), None
