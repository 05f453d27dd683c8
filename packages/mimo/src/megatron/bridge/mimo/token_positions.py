"""Positions of tokens where an encoder decides them: of every sample, or of every document of packed samples."""

import itertools
from typing import TYPE_CHECKING

from megatron.bridge.mimo.encoders import Encoder, Inputs
from megatron.bridge.mimo.places import ITEMS, PLACES, refuse_misplaced

if TYPE_CHECKING:
    from torch import Tensor


def decided_positions(name: str, encoder: Encoder, tokens: "Tensor", bounds: "Tensor | None", seen: Inputs) -> "Tensor":
    """Positions [axes, samples, sequence]; each document of a packed sample counts its own, by its own items.

    Args:
        name: of the modality.
        encoder: that decides.
        tokens: [samples, sequence].
        bounds: of the documents of packed samples [samples, documents + 1].
        seen: the encoder's inputs for these samples, with `items` and `places` (see `slices.encoder_inputs`).

    Raises:
        BridgeError: a sample or document has more or fewer tokens than its items have features.
    """
    inputs = {key: value for key, value in seen.items() if key not in (ITEMS, PLACES)}
    sizes = encoder.sizes(inputs)
    if sizes is not None:
        refuse_misplaced(name, encoder.token_id, seen[PLACES], seen[ITEMS], sizes)
    if bounds is None:
        return encoder.positions(tokens, inputs)
    return _by_document(encoder, tokens, bounds, seen[ITEMS], inputs)


def _by_document(encoder: Encoder, tokens: "Tensor", bounds: "Tensor", items: "Tensor", inputs: Inputs) -> "Tensor":
    import torch

    samples, first = [], 0
    for row, edges, counts in zip(tokens, bounds.tolist(), items.tolist(), strict=True):
        parts = []
        for (start, stop), count in zip(itertools.pairwise(edges), counts, strict=True):
            own = encoder.take(inputs, first, first + count) if count else {}
            first += count
            if stop > start:
                parts.append(encoder.positions(row[None, start:stop], own))
        samples.append(torch.cat(parts, -1))
    return torch.cat(samples, 1)
