"""Energon's text samples as training samples: every document cut into sequences, no token lost."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.energon import DefaultTaskEncoder, TextSample, stateless
from torch.utils.data import default_collate


class TextEncoder(DefaultTaskEncoder[Any, Any, Any, Any]):
    """Text to `tokens`, `labels`, `loss_mask`, `position_ids`, each `[sequence]`.

    A document of `n` tokens, its end included, becomes as many samples as it takes for each token but the first to be a
    label once; the last one is filled up with what does not count for the loss.

    Args:
        sequence_length: tokens per sample.
        tokenizer: of the run.
    """

    def __init__(self, sequence_length: int, tokenizer: Any) -> None:
        super().__init__()
        self._length, self._tokenizer = sequence_length, tokenizer

    @stateless  # type: ignore[untyped-decorator]
    def encode_sample(self, sample: TextSample) -> Iterator[dict[str, torch.Tensor]]:
        """The samples of one document."""
        ids = torch.tensor([*self._tokenizer.tokenize(sample.text), self._tokenizer.eod])
        for start in range(0, len(ids) - 1, self._length):
            yield self._window(ids[start : start + self._length + 1])

    def _window(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        known, length = len(ids) - 1, self._length
        padded = torch.full((length + 1,), self._tokenizer.eod)
        padded[: known + 1] = ids
        return {
            "tokens": padded[:-1],
            "labels": padded[1:],
            "loss_mask": (torch.arange(length) < known).float(),
            "position_ids": torch.arange(length),
        }

    def batch(self, samples: list[dict[str, torch.Tensor]]) -> Any:
        """Stack samples to a micro-batch."""
        return default_collate(samples)
