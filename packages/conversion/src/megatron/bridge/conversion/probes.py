"""What two implementations of a model are given to be compared by: tokens, and images where the model sees them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.model_bridge import MegatronModelBridge

# Least text tokens in every row besides the images', and what the length is a multiple of (sequence parallelism).
_TEXT, _MULTIPLE = 9, 8


@dataclass(frozen=True)
class Probe:
    """A batch for a comparison.

    Args:
        tokens: token ids [batch, sequence].
        inputs: per row, what the model takes besides, by the names that transformers gives it; empty for text alone.
    """

    tokens: "torch.Tensor"
    inputs: "Sequence[Mapping[str, torch.Tensor]]" = ()

    def to(self, device: "torch.device") -> "Probe":
        """The same on a device."""
        rows = [{name: value.to(device) for name, value in row.items()} for row in self.inputs]
        return Probe(self.tokens.to(device), rows)


def probe(bridge: "MegatronModelBridge", reference: Any, length: int = 32, seed: int = 20) -> Probe:
    """Two rows of random tokens, with one image in the first row and two in the second where the model sees images.

    Args:
        bridge: the family.
        reference: transformers' model, which knows how many tokens an image takes.
        length: tokens per row of text alone.
        seed: the same on every rank and in every run.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    vocabulary = bridge.hf_config.get_text_config().vocab_size
    images = [bridge.probe_images(count, generator) for count in (1, 2)]
    if not any(images):
        return Probe(torch.randint(0, vocabulary, (2, length), generator=generator))
    sizes = [_tokens_per_image(reference, inputs) for inputs in images]
    length = -(-(max(map(sum, sizes)) + _TEXT) // _MULTIPLE) * _MULTIPLE
    text = torch.tensor([token for token in range(vocabulary) if token not in bridge.special_tokens()])
    rows = [_row(each, length, bridge.special_tokens()[0], text, generator) for each in sizes]
    tokens = torch.stack(rows)
    images = [_as_parameters(inputs, reference.dtype) for inputs in images]
    types = [bridge.token_types(row[None]) for row in tokens]
    return Probe(tokens, [{**inputs, **kinds} for inputs, kinds in zip(images, types, strict=True)])


def _as_parameters(inputs: "Mapping[str, torch.Tensor]", dtype: "torch.dtype") -> "dict[str, torch.Tensor]":
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _tokens_per_image(reference: Any, inputs: "Mapping[str, torch.Tensor]") -> list[int]:
    import torch

    base = getattr(reference, "model", reference)
    with torch.no_grad():
        features = base.get_image_features(
            **_as_parameters({name: value.to(reference.device) for name, value in inputs.items()}, reference.dtype),
            return_dict=True,
        ).pooler_output
    return [image.shape[0] for image in features]


def _row(
    sizes: Sequence[int], length: int, image: int, text: "torch.Tensor", generator: "torch.Generator"
) -> "torch.Tensor":
    """Images of these many tokens, with text before, between and behind them."""
    import torch

    left, pieces = length - sum(sizes), []
    for size in sizes:
        before = max(1, left // (len(sizes) + 1) - 1)
        left -= before
        pieces += [text[torch.randint(0, len(text), (before,), generator=generator)], torch.full((size,), image)]
    return torch.cat([*pieces, text[torch.randint(0, len(text), (left,), generator=generator)]])
