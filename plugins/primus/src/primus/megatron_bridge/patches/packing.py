"""The patch `packing`: several conversations share a sequence."""

from typing import Any


def packing(cfg: Any) -> None:
    """Pack, which takes one sample per forward pass."""
    cfg.dataset.packing = True
    cfg.train.micro_batch_size = 1
