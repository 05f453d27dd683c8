"""What Megatron-Core's datasets and this project's training loop need of a tokenizer."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence


class Tokenizer(ABC):
    """A tokenizer as Megatron-Core's `GPTDataset` uses one.

    Attributes:
        vocab_size: number of ids that the model's embedding must hold; every id is below it.
        eod: id that ends a document.
        pad: id of padding, masked out of the loss; -1 when there is none that means nothing else.
        fingerprint: identity of the vocabulary, recorded beside preprocessed data; None when any data would do.
        name: what to call it in messages, e.g. its folder.
    """

    vocab_size: int
    eod: int
    pad: int
    fingerprint: str | None
    name: str

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`, without begin, end or padding tokens."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""

    @property
    def eos(self) -> int:
        """The same as `eod`: Megatron-Core asks for both names."""
        return self.eod

    @property
    def unique_identifiers(self) -> "OrderedDict[str, object]":
        """What Megatron-Core hashes to decide whether cached sample indices still fit."""
        return OrderedDict(
            [
                ("class", type(self).__qualname__),
                ("vocab_size", self.vocab_size),
                ("eod", self.eod),
                ("fingerprint", self.fingerprint),
            ]
        )
