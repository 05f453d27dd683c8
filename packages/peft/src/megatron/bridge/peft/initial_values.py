"""How LoRA's two matrices begin.

Every rank makes the whole matrices and keeps its part, so that the same seed gives the same adapter at any layout.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron.bridge.errors import BridgeError, did_you_mean


def generator(seed: int, name: str) -> torch.Generator:
    """Random numbers that belong to a seed and to a layer, on whichever rank that is."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def uniform(rows: int, columns: int, source: torch.Generator) -> Tensor:
    """A matrix [rows, columns] as `torch.nn.Linear` begins: uniform within 1 / sqrt(columns)."""
    bound = 1 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=source)


def normal(rows: int, columns: int, deviation: float, source: torch.Generator) -> Tensor:
    """A normal matrix [rows, columns] around zero."""
    return torch.empty(rows, columns).normal_(0.0, deviation, generator=source)


def _kaiming(rank: int, inputs: int, outputs: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    return uniform(rank, inputs, source), torch.zeros(outputs, rank)


def _gaussian(rank: int, inputs: int, outputs: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(rank, inputs, 1 / rank, source), torch.zeros(outputs, rank)


def _orthogonal(rank: int, inputs: int, outputs: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both matrices from one orthogonal basis, whose halves meet nowhere: A and B are dense, their product is zero."""
    basis, _ = torch.linalg.qr(normal(rank, rank, 1.0, source))
    odd, even = basis[0::2], basis[1::2]
    narrowing = normal(inputs, rank // 2, 1.0, source) @ odd / 10.0
    expanding = normal(rank // 2, outputs, 1.0, source).t() @ even / 10.0
    return narrowing.t().contiguous(), expanding.contiguous()


# Name -> A [rank, inputs] and B [outputs, rank].
RANDOM: dict[str, Callable[[int, int, int, torch.Generator], tuple[Tensor, Tensor]]] = {
    "kaiming": _kaiming,
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
}


def _pissa(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of rank `rank`, shared evenly between both (arXiv:2404.02948)."""
    left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first directions of a QR decomposition (arXiv:2406.01775)."""
    orthonormal, upper = torch.linalg.qr(weight.float())
    return upper[:rank], orthonormal[:, :rank]


# Name -> A and B of a weight [outputs, inputs]; what they give at the beginning is taken off again.
OF_THE_WEIGHT: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {"pissa": _pissa, "olora": _olora}

NAMES = (*RANDOM, *OF_THE_WEIGHT)


def refuse_unknown(name: str) -> None:
    """Refuse a name that stands for no initialisation.

    Raises:
        BridgeError: with near names.
    """
    if name not in NAMES:
        raise BridgeError(
            f"init_lora_weights={name!r} is not supported{did_you_mean(name, NAMES)}; there are {', '.join(NAMES)}"
        )
