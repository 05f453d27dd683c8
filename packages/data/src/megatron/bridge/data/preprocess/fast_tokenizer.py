"""A tokenizer as preprocessing needs it: JSON that every worker process can load without transformers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.data.tokenizers.fingerprint import vocabulary_fingerprint
from megatron.bridge.errors import BridgeError

# For these classes transformers takes tokenizer.json as it is; others rebuild parts of it in Python, so that only
# transformers itself knows the outcome.
_TAKEN_AS_IS = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
# Files of older releases that override tokenizer_config.json.
_LEGACY_FILES = ("special_tokens_map.json", "added_tokens.json")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class FastTokenizer:
    """`definition` is the text of a `tokenizer.json`; `eod` the id put after each document."""

    name: str
    definition: str
    eod: int
    vocab_size: int
    fingerprint: str


def load_fast_tokenizer(model: str | Path, trust_remote_code: bool = False) -> FastTokenizer:
    """The tokenizer of a Hugging Face folder or hub id, the same as `AutoTokenizer` gives.

    Raises:
        BridgeError: it cannot be loaded, has no end token, or no implementation in the `tokenizers` library.
    """
    name = str(model)
    from_folder = _from_folder(Path(name))
    return from_folder or _from_transformers(name, trust_remote_code)


def _from_folder(folder: Path) -> FastTokenizer | None:
    """Read the folder directly where that is sure to be what transformers would make of it (0.1 s instead of 4 s)."""
    from tokenizers import Tokenizer

    try:
        config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        definition = (folder / "tokenizer.json").read_text("utf-8")
    except (OSError, ValueError):  # transformers may know another way to read the folder, or says what is wrong
        return None
    try:
        tokenizer = Tokenizer.from_str(definition)
    except Exception as error:  # the library raises nothing narrower
        raise BridgeError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if config.get("tokenizer_class") not in _TAKEN_AS_IS or not _tokens_of(config) <= vocabulary.keys():
        return None
    if any((folder / name).exists() for name in _LEGACY_FILES):
        return None
    eos = _text_of(config.get("eos_token"))
    if eos is None:
        return None
    return FastTokenizer(
        name=str(folder),
        definition=definition,
        eod=vocabulary[eos],
        vocab_size=max(vocabulary.values()) + 1,
        fingerprint=vocabulary_fingerprint(vocabulary),
    )


def _from_transformers(name: str, trust_remote_code: bool) -> FastTokenizer:
    from megatron.bridge.data.tokenizers.huggingface import HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer(name, trust_remote_code=trust_remote_code)
    backend = getattr(tokenizer.hf_tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BridgeError(
            f"the tokenizer {name!r} is {type(tokenizer.hf_tokenizer).__name__}, written in Python; preprocessing "
            "needs a fast one (a tokenizer.json): convert it with transformers.convert_slow_tokenizer"
        )
    assert tokenizer.fingerprint is not None
    return FastTokenizer(name, backend.to_str(), tokenizer.eod, tokenizer.vocab_size, tokenizer.fingerprint)


def _tokens_of(config: dict[str, Any]) -> set[str]:
    """Every token that transformers would add to the vocabulary if it were not in it."""
    named = [config.get(key) for key in _SPECIAL_TOKENS]
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else list(extra)
    added = list((config.get("added_tokens_decoder") or {}).values())
    return {text for token in [*named, *extra, *added] if (text := _text_of(token)) is not None}


def _text_of(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
