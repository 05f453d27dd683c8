"""A Hugging Face tokenizer as Megatron-Core's datasets need one. Imports transformers when built."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.bridge.data.tokenizers.base import Tokenizer
from megatron.bridge.data.tokenizers.fingerprint import vocabulary_fingerprint
from megatron.bridge.errors import BridgeError


class HuggingFaceTokenizer(Tokenizer):
    """Wraps `transformers.AutoTokenizer`.

    Megatron-Core ships a wrapper of its own; it changes the tokenizer's special tokens while loading, masks the end
    of every document out of the loss when padding and end share an id, and fails late when there is no end token.

    Args:
        model: folder or hub id.
        vocab_size: size of the embedding, at least the tokenizer's; None takes the tokenizer's.
        trust_remote_code: allow the folder's own Python code to run.
    """

    def __init__(self, model: str, vocab_size: int | None = None, trust_remote_code: bool = False) -> None:
        self.name = str(model)
        self.hf_tokenizer = load_auto_tokenizer(self.name, trust_remote_code)
        ids = self.hf_tokenizer.get_vocab()
        own_size = max(len(self.hf_tokenizer), max(ids.values(), default=-1) + 1)
        if vocab_size is not None and vocab_size < own_size:
            raise BridgeError(
                f"tokenizer.vocab_size={vocab_size} is smaller than the {own_size} ids of the tokenizer {self.name!r}; "
                "raise it (and the model's vocab_size), or leave it out"
            )
        if self.hf_tokenizer.eos_token_id is None:
            raise BridgeError(no_end_token(self.name))
        self.vocab_size = vocab_size or own_size
        self.eod = int(self.hf_tokenizer.eos_token_id)
        pad = self.hf_tokenizer.pad_token_id
        # Padding that is also another special token would take that token out of the loss wherever it stands.
        others = {self.hf_tokenizer.eos_token_id, self.hf_tokenizer.bos_token_id, self.hf_tokenizer.unk_token_id}
        self.pad = -1 if pad is None or pad in others else int(pad)
        self.fingerprint = vocabulary_fingerprint(ids)

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written out in the text become their ids, as in transformers."""
        return list(self.hf_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def detokenize(self, ids: Sequence[int]) -> str:
        """The exact text of `ids`, special tokens included."""
        return str(self.hf_tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def load_auto_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """`AutoTokenizer.from_pretrained`, with a refusal that says what was tried."""
    from transformers import AutoTokenizer

    if Path(model).is_dir() and not any(Path(model).iterdir()):
        raise BridgeError(f"the tokenizer folder {model!r} is empty")
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError ... for bad folders
        where = "folder" if Path(model).is_dir() else "folder or hub id (there is no such folder here)"
        reason = str(error).strip().splitlines()
        raise BridgeError(
            f"no tokenizer can be loaded from the {where} {model!r}: "
            f"{type(error).__name__}: {reason[0] if reason else 'no reason given'}"
        ) from error


def no_end_token(name: str) -> str:
    """Why a tokenizer without an end token is refused, and what to do."""
    return (
        f"the tokenizer {name!r} has no eos_token, so documents would run into each other; "
        "set eos_token in its tokenizer_config.json"
    )
