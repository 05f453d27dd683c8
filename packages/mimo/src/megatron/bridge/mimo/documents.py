"""Documents of packed samples: where they begin and end, and several samples as Megatron-Core's one packed row."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from torch import Tensor

BOUNDS = "cu_seqlens"


def stacked_bounds(samples: Sequence[Mapping[str, Any]]) -> "Tensor | None":
    """`cu_seqlens` of packed samples, [samples, most documents + 1]; None where no sample is packed.

    A sample with fewer documents repeats its last bound: what is between two that are equal is no document.

    Raises:
        BridgeError: some samples are packed and some are not.
    """
    import torch

    given = [sample.get(BOUNDS) for sample in samples]
    found = [each for each in given if each is not None]
    if not found:
        return None
    if len(found) < len(given):
        number = next(number for number, each in enumerate(given) if each is None)
        raise BridgeError(
            f"sample {number} of the batch has no {BOUNDS}, and others have; pack all samples of a dataset, or none"
        )
    widest = max(len(each) for each in found)
    return torch.stack([torch.cat([each, each[-1:].expand(widest - len(each))]) for each in found])


def checked_bounds(bounds: "Tensor | None", tokens: "Tensor") -> "Tensor | None":
    """`cu_seqlens` [samples, documents + 1] of `tokens` [samples, sequence], as whole numbers.

    Raises:
        BridgeError: a sample's bounds do not ascend from 0 to the end of the sequence.
    """
    if bounds is None:
        return None
    samples, length = tokens.shape
    if bounds.dim() != 2 or len(bounds) != samples:
        raise BridgeError(
            f"{BOUNDS} of shape {list(bounds.shape)} must be [{samples} samples, documents + 1]; megatron.bridge.mimo."
            "collate makes it so"
        )
    for sample, each in enumerate(bounds.tolist()):
        if each[0] != 0 or each[-1] != length or each != sorted(each):
            raise BridgeError(
                f"sample {sample}: {BOUNDS}={each} must ascend from 0 to its {length} tokens; make padding at the end "
                "a document of its own"
            )
    return bounds.long()


def one_row(value: "Tensor | None") -> "Tensor | None":
    """Samples one after another in one row: [..., samples, sequence] -> [..., 1, samples x sequence]."""
    return None if value is None else value.flatten(-2).unsqueeze(-2)


def bounds_in_one_row(bounds: "Tensor", length: int) -> "Tensor":
    """Bounds of all documents that are not empty in `one_row` of samples, [1, documents + 1].

    Args:
        bounds: of each sample [samples, documents + 1].
        length: tokens of a sample.
    """
    import torch

    starts = torch.arange(len(bounds), device=bounds.device)[:, None] * length
    return (bounds + starts).flatten().unique_consecutive()[None].int()
