"""Where in the tokens the features of each modality go, and what does not go together."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from torch import Tensor

# What stands beside an encoder's own inputs in a batch, per sample or per document of packed samples: the number of
# items and of tokens.
ITEMS, PLACES = "items", "places"


def places_of(tokens: "Tensor", token_id: int, bounds: "Tensor | None" = None) -> "Tensor":
    """How many features there are places for in token ids [samples, sequence].

    Args:
        tokens: of the language model.
        token_id: of the modality.
        bounds: of the documents of packed samples [samples, documents + 1].

    Returns:
        Of each sample [samples]; with bounds of each document [samples, documents].
    """
    import torch

    found = tokens == token_id
    if bounds is None:
        return found.sum(1)
    before = torch.nn.functional.pad(found.cumsum(1), (1, 0))
    return before.gather(1, bounds.long()).diff(dim=1)


def items_of(name: str, items: "Tensor | None", places: "Tensor", number: int) -> "Tensor":
    """How many items each sample has, or each document of packed samples: of the shape of `places`.

    Args:
        name: of the modality, in messages.
        items: what the batch says; None stands for one item in every sample, or none at all.
        places: how many tokens of the modality each one has (see `places_of`).
        number: items in the batch.

    Raises:
        BridgeError: the numbers do not add up.
    """
    import torch

    packed, samples = places.dim() > 1, len(places)
    each = "document of packed samples" if packed else "sample"
    if items is None:
        if number and (packed or number != samples):
            raise BridgeError(
                f"the batch has {number} {name} for {samples} samples and does not say whose they are; give "
                f"modality_inputs[{name!r}][{ITEMS!r}], the number that each {each} has"
            )
        return torch.full_like(places, bool(number))
    counts = torch.as_tensor(items)
    if counts.shape != places.shape or int(counts.sum()) != number:
        whose = f"each document, {list(places.shape)}," if packed else f"each of {samples} samples"
        raise BridgeError(
            f"modality_inputs[{name!r}][{ITEMS!r}]={counts.tolist()} must have one number for {whose} and add up to "
            f"the {number} {name} of the batch"
        )
    return counts


def refuse_misplaced(
    name: str, token_id: int, places: "Tensor", items: "Tensor | None", sizes: Sequence[int], first: int = 0
) -> None:
    """Refuse unless every sample, and every document of one, has as many tokens of a modality as its items features.

    Args:
        name: of the modality.
        token_id: its token.
        places: how many of these tokens each sample has (see `places_of`).
        items: how many items each sample has, of the same shape.
        sizes: features of each item.
        first: number of the first sample, in messages.

    Raises:
        BridgeError: names the first sample, and its document, where they differ.
    """
    counts = items_of(name, items, places, len(sizes)).flatten().tolist()
    taken = 0
    for index, (tokens, count) in enumerate(zip(places.flatten().tolist(), counts, strict=True)):
        features = sum(sizes[taken : taken + count])
        taken += count
        if features != tokens:
            missing = f"; its {name} are missing from the batch" if not count else ""
            raise BridgeError(
                f"{_told(index, places, first)} has {tokens} {name} tokens (id {token_id}), and its {count} {name} "
                f"have {features} features{missing}; the tokens must be made for this encoder, one for each feature"
                + ("" if places.dim() == 1 else ", and all of an item's in one document")
            )


def _told(index: int, places: "Tensor", first: int) -> str:
    """Which sample, or document of one, stands at `index` of the flattened places."""
    if places.dim() == 1:
        return f"sample {first + index}"
    sample, document = divmod(index, places.shape[1])
    return f"document {document} of sample {first + sample}"
