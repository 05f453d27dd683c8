"""The `tokenizer` section of a run's configuration, and the tokenizer that it describes. Torch-free until built."""

from dataclasses import dataclass

from megatron.bridge.data.tokenizers.base import Tokenizer
from megatron.bridge.errors import BridgeError, did_you_mean

TOKENIZER_TYPES = ("huggingface", "null")


@dataclass(kw_only=True)
class TokenizerConfig:
    """Which tokenizer a run uses.

    Attributes:
        tokenizer_type: `"huggingface"`, `"null"` (ids written as text, for mock data), or None: `"huggingface"` when
            `tokenizer_model` is given, else `"null"`.
        tokenizer_model: Hugging Face folder or hub id.
        vocab_size: number of ids of the embedding; None takes the tokenizer's. It may be larger than the tokenizer's
            (padded embeddings), never smaller. Required by `"null"`.
        eod_id: end-of-document id of a `"null"` tokenizer; None takes `vocab_size - 1`.
        trust_remote_code: allow the folder's own Python code to run.
    """

    tokenizer_type: str | None = None
    tokenizer_model: str | None = None
    vocab_size: int | None = None
    eod_id: int | None = None
    trust_remote_code: bool = False

    def resolved_type(self) -> str:
        """`"huggingface"` or `"null"`.

        Raises:
            BridgeError: unknown type, or a type that contradicts the other fields.
        """
        kind = self.tokenizer_type or ("huggingface" if self.tokenizer_model else "null")
        if kind not in TOKENIZER_TYPES:
            raise BridgeError(
                f"tokenizer.tokenizer_type={kind!r} is unknown{did_you_mean(kind, TOKENIZER_TYPES)} "
                f"(known: {', '.join(TOKENIZER_TYPES)})"
            )
        if kind == "huggingface" and not self.tokenizer_model:
            raise BridgeError(
                "tokenizer.tokenizer_type='huggingface' needs tokenizer.tokenizer_model: a folder or a hub id"
            )
        if kind == "null" and self.tokenizer_model:
            raise BridgeError(
                f"tokenizer.tokenizer_model={self.tokenizer_model!r} would be ignored by tokenizer_type='null'; "
                "drop one of the two"
            )
        if kind == "huggingface" and self.eod_id is not None:
            raise BridgeError(
                f"tokenizer.eod_id={self.eod_id} is for tokenizer_type='null'; "
                "a Hugging Face tokenizer ends documents with its eos_token"
            )
        return kind


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config` describes.

    Raises:
        BridgeError: it cannot be loaded, has no end-of-sequence token, or does not fit `config.vocab_size`.
    """
    if config.resolved_type() == "huggingface":
        from megatron.bridge.data.tokenizers.huggingface import HuggingFaceTokenizer

        assert config.tokenizer_model is not None
        return HuggingFaceTokenizer(config.tokenizer_model, config.vocab_size, config.trust_remote_code)
    from megatron.bridge.data.tokenizers.null import NullTokenizer

    if config.vocab_size is None:
        raise BridgeError(
            "tokenizer.vocab_size is not set; a tokenizer of type 'null' needs it (usually the model's vocab_size), "
            "or set tokenizer.tokenizer_model to a Hugging Face folder"
        )
    return NullTokenizer(config.vocab_size, config.eod_id)
