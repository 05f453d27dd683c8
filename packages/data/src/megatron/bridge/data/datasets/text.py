"""Training on text: tokenized once when the run starts, then read as `gpt` reads. Torch-free until built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron.bridge.data.datasets.gpt import GPTDatasetConfig
from megatron.bridge.data.provider import DatasetBuildContext, DatasetProvider

if TYPE_CHECKING:
    from megatron.bridge.data.provider import Split


@dataclass(kw_only=True)
class TextDatasetConfig(GPTDatasetConfig):
    """`gpt`, with text where that has prefixes: text files, JSONL, Parquet, folders, Hugging Face datasets on disk.

    Each is tokenized on rank 0 before the model is built, and kept in `path_to_cache` (or `cache` beside it) until it
    or the tokenizer changes; the other ranks wait. What takes longer than `dist.timeout_seconds` is for
    `megatron-bridge data preprocess`.

    Attributes:
        json_key: key of the text in JSONL, or its column in Parquet and datasets.
        document: what a document of a text file is: `file`, `paragraph` or `line`.
        globs: which files of a folder.
        workers: processes that tokenize.
    """

    json_key: str = "text"
    document: str = "file"
    globs: list[str] = field(default_factory=list)
    workers: int = 1

    def validate(self, context: DatasetBuildContext) -> None:
        """Refuse absent files and contradictions; of what is tokenized already, also what `gpt` would refuse."""
        from megatron.bridge.data.datasets.text_build import plan_texts

        DatasetProvider.validate(self, context)
        plan = plan_texts(self, context)
        if not plan.missing:
            plan.config.validate(context)

    def build_train_valid_test_datasets(self, context: DatasetBuildContext) -> tuple[Split, Split, Split]:
        """Tokenize what is not tokenized yet, and build as `gpt` does. Every rank must call this."""
        from megatron.bridge.data.datasets.text_build import tokenize_together

        return tokenize_together(self, context).build_train_valid_test_datasets(context)
