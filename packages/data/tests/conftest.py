"""Fixtures of the data package's tests: a tokenizer trained on real English, and the texts it was trained on."""

import os
import pydoc_data.topics
from pathlib import Path

import pytest

from megatron.bridge.data.tokenizers import train_bpe_tokenizer

# Deterministic and safe to fork after: a single thread in the tokenizers library.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
VOCAB_SIZE = 600


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """The articles of Python's own help: about 490 kB of English in some 80 documents."""
    return [pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics)]


@pytest.fixture(scope="session")
def tokenizer_folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bpe_tokenizer(texts, VOCAB_SIZE, tmp_path_factory.mktemp("tokenizers") / "help")


@pytest.fixture(scope="session")
def text_folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One `.txt` file per article."""
    folder = tmp_path_factory.mktemp("articles")
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text, "utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus_prefix(text_folder: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The articles, preprocessed. Read only: tests that change files make a copy."""
    from megatron.bridge.data.preprocess import preprocess_corpus

    prefix = str(tmp_path_factory.mktemp("corpus") / "help")
    preprocess_corpus([text_folder], prefix, tokenizer_folder)
    return prefix


CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@pytest.fixture(scope="session")
def chat_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer with the special tokens of ChatML and Llama 3, and no chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHAT_TOKENS)})
    folder = tmp_path_factory.mktemp("chat") / "tokenizer"
    tokenizer.save_pretrained(folder)
    return folder
