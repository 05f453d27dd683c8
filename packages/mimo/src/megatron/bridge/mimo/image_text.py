"""An image and a text as a sample: tokens with places for its features, pixels for the tower, a loss mask."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.places import ITEMS
from megatron.bridge.mimo.slices import MODALITIES

if TYPE_CHECKING:
    from PIL.Image import Image

    from megatron.bridge.data.tokenizers import Tokenizer

_IMAGE, _QUESTION = "{image}", "{question}"


@dataclass(kw_only=True)
class ImageText:
    """How an image, what is asked about it and what is to be said become a sample. The answer and its end are trained.

    Attributes:
        processor: folder or hub id of transformers' image processor.
        image_token_id: the token that stands for one feature, as the encoder's `token_id`.
        tokens_per_image: features of an image behind the projector; None where images differ, and the processor says by
            a grid of patches how many there are.
        prompt: what comes before the answer: `{image}` once, and perhaps `{question}`. Its parts are tokenized apart.
        modality: name of the encoder in the placement.
        truncation: what happens to a longer sample: `refuse`, or `right` (the end of the answer is cut off).
    """

    processor: str | None = None
    image_token_id: int | None = None
    tokens_per_image: int | None = None
    prompt: str = _IMAGE + _QUESTION
    modality: str = "images"
    truncation: Literal["refuse", "right"] = "refuse"

    def problems(self) -> list[str]:
        """What is wrong with these settings; nothing is loaded for it."""
        absent = [name for name in ("processor", "image_token_id") if getattr(self, name) is None]
        found = [f"{name} is not set" for name in absent]
        if self.prompt.count(_IMAGE) != 1:
            found.append(f"prompt={self.prompt!r} must have {_IMAGE} once")
        if self.tokens_per_image is not None and self.tokens_per_image < 1:
            found.append(f"tokens_per_image={self.tokens_per_image} must be at least 1")
        if self.truncation not in ("refuse", "right"):
            found.append(f"truncation={self.truncation!r} is none of 'refuse', 'right'")
        return found

    def length(self, tokenizer: "Tokenizer", question: str, answer: str) -> int | None:
        """Tokens of a sample, told without its image; None where that decides."""
        if self.tokens_per_image is None:
            return None
        before, after = self._around(tokenizer, question)
        return len(before) + self.tokens_per_image + len(after) + len(tokenizer.tokenize(answer))

    def sample(
        self, tokenizer: "Tokenizer", image: "Image", question: str, answer: str, *, longest: int, origin: str
    ) -> dict[str, Any]:
        """A sample for `collate` and `PackedSamples`, as long as it is.

        Args:
            tokenizer: of the run.
            image: as PIL has it.
            question: about the image; may be empty.
            answer: what is trained.
            longest: tokens that a sample may have.
            origin: which sample it is, in messages.

        Raises:
            BridgeError: it is longer, and must not or cannot be cut off.
        """
        import torch

        assert self.processor is not None
        assert self.image_token_id is not None
        inputs = dict(_processor(self.processor)(image.convert("RGB"), return_tensors="pt"))
        before, after = self._around(tokenizer, question)
        asked = [*before, *[self.image_token_id] * self._features(inputs), *after]
        said = [*tokenizer.tokenize(answer), tokenizer.eod]
        ids = torch.tensor(self._cut([*asked, *said], len(asked), longest, origin))
        labels = ids[1:]
        return {
            "tokens": ids[:-1],
            # A place of a feature is no token of the vocabulary.
            "labels": labels.masked_fill(labels == self.image_token_id, tokenizer.eod),
            "loss_mask": (torch.arange(1, len(ids)) >= len(asked)).float(),
            "position_ids": torch.arange(len(ids) - 1),
            MODALITIES: {self.modality: {**inputs, ITEMS: torch.tensor(1)}},
        }

    def _around(self, tokenizer: "Tokenizer", question: str) -> tuple[list[int], list[int]]:
        """Tokens of the prompt before and behind the image."""
        before, _, after = self.prompt.partition(_IMAGE)
        parts = (tokenizer.tokenize(part.replace(_QUESTION, question)) for part in (before, after))
        return next(parts), next(parts)

    def _features(self, inputs: dict[str, Any]) -> int:
        if self.tokens_per_image is not None:
            return self.tokens_per_image
        grid, merged = inputs.get("image_grid_thw"), getattr(_processor(str(self.processor)), "merge_size", None)
        if grid is None or merged is None:
            raise BridgeError(
                f"the image processor {self.processor!r} does not say how many features an image has; set "
                "tokens_per_image to what is behind the encoder's projector"
            )
        return int(grid.prod()) // int(merged) ** 2

    def _cut(self, ids: list[int], asked: int, longest: int, origin: str) -> list[int]:
        if len(ids) <= longest + 1:
            return ids
        if self.truncation == "refuse" or asked > longest:
            remedy = "raise dataset.sequence_length"
            raise BridgeError(
                f"{origin} has {len(ids) - 1} tokens, {asked} of them before its answer, and {longest} fit; {remedy}"
                + ("" if asked > longest else ", or set truncation='right'")
            )
        return ids[: longest + 1]


def filled_up(sample: dict[str, Any], length: int, pad: int) -> dict[str, Any]:
    """A sample with padding behind it, up to `length` tokens; it is not trained."""
    import torch

    left = length - len(sample["tokens"])
    fill = torch.full((left,), pad)
    return {
        **sample,
        "tokens": torch.cat([sample["tokens"], fill]),
        "labels": torch.cat([sample["labels"], fill]),
        "loss_mask": torch.cat([sample["loss_mask"], torch.zeros(left)]),
        "position_ids": torch.arange(length),
    }


@lru_cache(maxsize=4)
def _processor(source: str) -> Any:
    """transformers' image processor of a folder or hub id.

    Raises:
        BridgeError: there is none.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise BridgeError(
            f"processor={source!r} gives no image processor of transformers: {error}; name a folder with "
            "preprocessor_config.json, or a hub id"
        ) from error
