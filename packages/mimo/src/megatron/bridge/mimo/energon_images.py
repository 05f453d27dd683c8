"""Energon's images with captions or questions, as samples of a MIMO model. Imports megatron.energon."""

from typing import Any

from megatron.energon import CaptioningSample, DefaultTaskEncoder, SampleDecoder, VQASample, stateless

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.data import collate
from megatron.bridge.mimo.image_text import ImageText, filled_up


class ImageTextEncoder(DefaultTaskEncoder[Any, Any, Any, Any]):
    """`CaptioningSample` and `VQASample` to samples of one length with an image each.

    Of several answers the one with the largest weight is trained, or the first one.

    Args:
        sequence_length: tokens per sample; what is left is padding.
        tokenizer: of the run.
        options: the fields of `ImageText`.

    Raises:
        BridgeError: an option is wrong.
    """

    decoder = SampleDecoder(image_decode="pilrgb")

    def __init__(self, sequence_length: int, tokenizer: Any, **options: Any) -> None:
        super().__init__()
        self._length, self._tokenizer, self._form = sequence_length, tokenizer, ImageText(**options)
        if problems := self._form.problems():
            raise BridgeError("dataset.task_encoder_options: " + "; ".join(problems))

    @stateless  # type: ignore[untyped-decorator]
    def encode_sample(self, sample: Any) -> dict[str, Any]:
        """One sample.

        Raises:
            BridgeError: it is of another kind, has no answer, or is too long.
        """
        question, answer = _texts(sample)
        found = self._form.sample(
            self._tokenizer, sample.image, question, answer, longest=self._length, origin=f"sample {sample.__key__!r}"
        )
        return filled_up(found, self._length, self._tokenizer.eod)

    def batch(self, samples: list[dict[str, Any]]) -> Any:
        """See `collate`."""
        return collate(samples)


def _texts(sample: Any) -> tuple[str, str]:
    """What is asked, and what is to be said."""
    if isinstance(sample, CaptioningSample):
        return "", sample.caption
    if not isinstance(sample, VQASample):
        raise BridgeError(
            f"sample {getattr(sample, '__key__', '?')!r} is a {type(sample).__name__}; ImageTextEncoder takes "
            "CaptioningSample and VQASample. Write a task encoder of your own for others"
        )
    if not sample.answers:
        raise BridgeError(f"sample {sample.__key__!r} has no answer; leave such samples out of the shards")
    if sample.answer_weights is None:
        return sample.context, sample.answers[0]
    return sample.context, sample.answers[int(sample.answer_weights.argmax())]
