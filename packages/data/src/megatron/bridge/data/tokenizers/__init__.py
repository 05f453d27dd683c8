"""Tokenizers: what a run configures, what datasets need of one, and how to train a small one."""

import importlib
from typing import TYPE_CHECKING, Any

from megatron.bridge.data.tokenizers.base import Tokenizer
from megatron.bridge.data.tokenizers.config import TokenizerConfig, build_tokenizer

if TYPE_CHECKING:
    from megatron.bridge.data.tokenizers.bpe import train_bpe_tokenizer as train_bpe_tokenizer
    from megatron.bridge.data.tokenizers.huggingface import HuggingFaceTokenizer as HuggingFaceTokenizer
    from megatron.bridge.data.tokenizers.null import NullTokenizer as NullTokenizer

_MODULES = {"train_bpe_tokenizer": "bpe", "HuggingFaceTokenizer": "huggingface", "NullTokenizer": "null"}

__all__ = [
    "HuggingFaceTokenizer",
    "NullTokenizer",
    "Tokenizer",
    "TokenizerConfig",
    "build_tokenizer",
    "train_bpe_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
