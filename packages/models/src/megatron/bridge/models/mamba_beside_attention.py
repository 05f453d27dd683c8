"""What a model says about Mamba-2 mixers that stand beside attention (Falcon-H1, arXiv:2507.22448). Data only."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MambaBesideAttention:
    """What the model's `mamba_*` sizes do not say about the mixer, and what attention and mixer are scaled by.

    Args:
        attention_in, attention_out: factors on what attention reads and gives.
        mixer_in, mixer_out: factors on what the mixer reads and gives.
        mixer: further arguments of `TorchMambaMixer`.
    """

    attention_in: float = 1.0
    attention_out: float = 1.0
    mixer_in: float = 1.0
    mixer_out: float = 1.0
    mixer: dict[str, Any] = field(default_factory=dict)
