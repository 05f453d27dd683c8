"""A tokenizer without a vocabulary: ids written as decimal numbers. For mock data and tests."""

from collections.abc import Sequence

from megatron.bridge.data.tokenizers.base import Tokenizer
from megatron.bridge.errors import BridgeError


class NullTokenizer(Tokenizer):
    """`"3 1 4"` is the ids 3, 1 and 4; `eod` is the last id of the vocabulary unless given."""

    fingerprint = None
    name = "null"

    def __init__(self, vocab_size: int, eod_id: int | None = None) -> None:
        if vocab_size < 2:
            raise BridgeError(f"tokenizer.vocab_size={vocab_size} is too small: a token and its end need at least 2")
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1 if eod_id is None else eod_id
        self.pad = -1
        if not 0 <= self.eod < vocab_size:
            raise BridgeError(f"tokenizer.eod_id={self.eod} lies outside tokenizer.vocab_size={vocab_size}")

    def tokenize(self, text: str) -> list[int]:
        """Ids from decimal numbers divided by white space."""
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise BridgeError(f"a tokenizer of type 'null' reads decimal ids, not {text[:60]!r}") from error
        outside = [token for token in ids if not 0 <= token < self.vocab_size]
        if outside:
            raise BridgeError(f"id {outside[0]} lies outside tokenizer.vocab_size={self.vocab_size}")
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """The ids as decimal numbers divided by one blank."""
        return " ".join(str(token) for token in ids)
