"""From text with marked answers to tokens and the mask of those that are trained, exactly."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.bridge.data.instruction.messages import BadRow
from megatron.bridge.data.instruction.rendering import Rendering


@dataclass(frozen=True)
class Encoded:
    """Tokens `[n]` (int32) and, for each, whether it is trained (bool): a mask of targets, not yet shifted."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


def encode(tokenizer: Any, renderings: Sequence[Rendering]) -> list[Encoded | BadRow]:
    """Tokenize each text as a whole, as transformers does; the mask follows from where each token stands in the text.

    Where a token would reach over the edge of an answer, the two sides are tokenized apart: at inference the prompt is
    tokenized before the answer exists. What decodes to another text then is refused.

    Returns:
        One per rendering; a `BadRow` where the mask cannot be determined.
    """
    if not renderings:
        return []
    if not tokenizer.is_fast:
        return [_apart(tokenizer, each) for each in renderings]
    found = tokenizer(
        [each.text for each in renderings], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    rows = zip(renderings, found["input_ids"], found["offset_mapping"], strict=True)
    return [_masked(ids, offsets, each) or _apart(tokenizer, each) for each, ids, offsets in rows]


def _masked(ids: list[int], offsets: list[tuple[int, int]], rendering: Rendering) -> Encoded | None:
    """The mask by the tokens' places; None where a token reaches over an edge."""
    if not ids:
        return Encoded(np.empty(0, np.int32), np.empty(0, bool))
    places = np.asarray(offsets, np.int64)
    # A tokenizer may leave white space out of a token's place: it belongs to the token that follows.
    stops = np.maximum.accumulate(places[:, 1])
    starts = np.minimum(places[:, 0], np.concatenate(([0], stops[:-1])))
    trained = np.zeros(len(ids), bool)
    for start, stop in rendering.spans:
        # Several tokens of one character share its place, hence `starts < edge < stops`.
        if any(((starts < edge) & (stops > edge)).any() for edge in (start, stop)):
            return None
        trained |= (starts >= start) & (stops <= stop) & (stops > start)
    return Encoded(np.asarray(ids, np.int32), trained)


def _apart(tokenizer: Any, rendering: Rendering) -> Encoded | BadRow:
    """Each piece of the text tokenized by itself."""
    ids: list[int] = []
    trained: list[bool] = []
    for text, is_trained in _pieces(rendering):
        piece = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += piece
        trained += [is_trained] * len(piece)
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != rendering.text:
        return BadRow(
            "a token reaches over the edge of an answer, and tokenized apart prompt and answer decode to another text; "
            "let the template end the prompt, or begin the answer, with a special token"
        )
    return Encoded(np.asarray(ids, np.int32), np.asarray(trained, bool))


def _pieces(rendering: Rendering) -> Iterator[tuple[str, bool]]:
    end = 0
    for start, stop in rendering.spans:
        yield rendering.text[end:start], False
        yield rendering.text[start:stop], True
        end = stop
    yield rendering.text[end:], False
