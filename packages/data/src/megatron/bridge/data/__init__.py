"""Datasets, tokenizers and preprocessing for Megatron-Core training.

Nothing heavy is imported here: every public name is loaded from its module when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.bridge.data.datasets.energon import EnergonDatasetConfig as EnergonDatasetConfig
    from megatron.bridge.data.datasets.gpt import GPTDatasetConfig as GPTDatasetConfig
    from megatron.bridge.data.datasets.mock import MockGPTDatasetConfig as MockGPTDatasetConfig
    from megatron.bridge.data.datasets.preference import PreferenceDatasetConfig as PreferenceDatasetConfig
    from megatron.bridge.data.datasets.sft import SFTDatasetConfig as SFTDatasetConfig
    from megatron.bridge.data.datasets.text import TextDatasetConfig as TextDatasetConfig
    from megatron.bridge.data.loaders import build_data_iterator as build_data_iterator
    from megatron.bridge.data.preprocess import preprocess_corpus as preprocess_corpus
    from megatron.bridge.data.provider import DatasetBuildContext as DatasetBuildContext
    from megatron.bridge.data.provider import DatasetProvider as DatasetProvider
    from megatron.bridge.data.tokenizers import TokenizerConfig as TokenizerConfig
    from megatron.bridge.data.tokenizers import build_tokenizer as build_tokenizer

_MODULES = {
    "EnergonDatasetConfig": "datasets.energon",
    "GPTDatasetConfig": "datasets.gpt",
    "MockGPTDatasetConfig": "datasets.mock",
    "PreferenceDatasetConfig": "datasets.preference",
    "SFTDatasetConfig": "datasets.sft",
    "TextDatasetConfig": "datasets.text",
    "build_data_iterator": "loaders",
    "preprocess_corpus": "preprocess",
    "DatasetBuildContext": "provider",
    "DatasetProvider": "provider",
    "TokenizerConfig": "tokenizers",
    "build_tokenizer": "tokenizers",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
