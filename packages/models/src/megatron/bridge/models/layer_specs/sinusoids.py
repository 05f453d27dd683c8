"""Positions by fixed waves (arXiv:1706.03762), in the place of learned position embeddings."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

type Waves = Literal["transformer", "tensor2tensor"]


class SinusoidalPositions(nn.Module):
    """Sines and then cosines of a position, for frequencies from 1 down towards 1 / 10000.

    Args:
        positions: how many there are.
        size: channels, an even number.
        waves: the lowest frequency is 10000^(2/size) times 1/10000 (`transformer`, the paper's), or 1/10000 itself
            (`tensor2tensor`, that library's).
    """

    def __init__(self, positions: int, size: int, waves: Waves) -> None:
        super().__init__()
        half = size // 2
        steps = half if waves == "transformer" else half - 1
        frequencies = torch.exp(torch.arange(half).float() * (-math.log(10000) / steps))
        angles = torch.arange(positions).float()[:, None] * frequencies
        self.register_buffer("table", torch.cat([angles.sin(), angles.cos()], 1), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions `[batch, sequence]` to `[batch, sequence, size]`."""
        table: Tensor = self.get_buffer("table")
        return nn.functional.embedding(positions, table)
