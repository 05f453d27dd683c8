"""Where in the tokens the features of each modality go, and what does not go together."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from torch import Tensor

# What stands beside an encoder's own inputs in a batch: per sample, the number of items and of tokens.
ITEMS, PLACES = "items", "places"


def places_of(tokens: "Tensor", token_id: int) -> "Tensor":
    """How many features each sample has places for: [samples] from token ids [samples, sequence]."""
    return (tokens == token_id).sum(1)


def items_of_samples(name: str, items: "Tensor | None", samples: int, number: int) -> list[int]:
    """How many items each sample has.

    Args:
        name: of the modality, in messages.
        items: what the batch says; None stands for one item in every sample, or none at all.
        samples: in the batch.
        number: items in the batch.

    Raises:
        BridgeError: the numbers do not add up.
    """
    if items is None:
        if number not in (0, samples):
            raise BridgeError(
                f"the batch has {number} {name} for {samples} samples and does not say whose they are; give "
                f"modality_inputs[{name!r}][{ITEMS!r}], the number that each sample has"
            )
        return [1 if number else 0] * samples
    counts = [int(each) for each in items]
    if len(counts) != samples or sum(counts) != number:
        raise BridgeError(
            f"modality_inputs[{name!r}][{ITEMS!r}]={counts} must have one number for each of {samples} samples and add "
            f"up to the {number} {name} of the batch"
        )
    return counts


def refuse_misplaced(
    name: str, token_id: int, places: "Tensor", items: "Tensor | None", sizes: Sequence[int], first: int = 0
) -> None:
    """Refuse unless every sample has as many tokens of a modality as its items have features.

    Args:
        name: of the modality.
        token_id: its token.
        places: how many of these tokens each sample has.
        items: how many items each sample has.
        sizes: features of each item.
        first: number of the first sample, in messages.

    Raises:
        BridgeError: names the first sample where they differ.
    """
    wanted, taken = [int(each) for each in places], 0
    counts = items_of_samples(name, items, len(wanted), len(sizes))
    for sample, (tokens, count) in enumerate(zip(wanted, counts, strict=True)):
        features = sum(sizes[taken : taken + count])
        taken += count
        if features != tokens:
            missing = f"; its {name} are missing from the batch" if not count else ""
            raise BridgeError(
                f"sample {first + sample} has {tokens} {name} tokens (id {token_id}), and its {count} {name} have "
                f"{features} features{missing}; the tokens must be made for this encoder, one for each feature"
            )
