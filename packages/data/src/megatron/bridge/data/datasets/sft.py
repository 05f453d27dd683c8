"""Instruction data for supervised fine-tuning: rows of any format, a template, a loss mask. Torch-free until built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.bridge.data.provider import DatasetBuildContext, DatasetProvider

if TYPE_CHECKING:
    from megatron.bridge.data.instruction.formats import DatasetFormat
    from megatron.bridge.data.provider import Split


@dataclass(kw_only=True)
class SFTDatasetConfig(DatasetProvider):
    """Conversations, divided into train, validation and test; every token's part in the loss is known, or refused.

    Attributes:
        data_paths: JSONL, JSON, Parquet, Hugging Face datasets on disk, or folders of files, divided by `split`.
        train_data_paths, valid_data_paths, test_data_paths: the same for one split each, instead of `data_paths`.
        split: shares of train, validation and test. Which row goes where depends on nothing but how many there are.
        dataset_format: what rows mean: a name of the group `megatron.bridge.dataset_formats`, or `module:function`.
        prompt_template: how conversations are written: `chat_template` (the tokenizer's own), a name of the group
            `megatron.bridge.prompt_templates`, or `custom`.
        custom_template: with `custom`: a Jinja chat template, or a file that holds one.
        loss: what is trained: every answer of the `assistant`, the `last_turn`'s, all from the first answer on
            (`completion`), or `all`.
        sequence_length: tokens per sample.
        truncation: what happens to longer conversations: `refuse`, `right` (the end is cut off), `turns` (the oldest
            exchanges go), `drop` (left out and counted).
        skip_bad_rows: how many rows may be unusable; they are counted and listed.
        packing: several conversations per sample, each with positions and attention of its own.
        random_seed: seeds the order of samples, anew for each pass.
        path_to_cache: folder for the tokenized rows; None takes `cache` beside the first file.
    """

    data_paths: list[str] | None = None
    train_data_paths: list[str] | None = None
    valid_data_paths: list[str] | None = None
    test_data_paths: list[str] | None = None
    split: str = "99,1,0"
    dataset_format: str = "chat"
    prompt_template: str = "chat_template"
    custom_template: str | None = None
    loss: str = "assistant"
    sequence_length: int | None = None
    truncation: str = "refuse"
    skip_bad_rows: int = 0
    packing: bool = False
    random_seed: int = 1234
    path_to_cache: str | None = None

    @property
    def paired(self) -> bool:
        """Whether a row gives two conversations, which make up one sample."""
        return False

    def form(self) -> DatasetFormat:
        """What rows mean."""
        from megatron.bridge.data.instruction.formats import dataset_format

        return dataset_format(self.dataset_format)

    def conversation_length(self) -> int | None:
        """How many tokens a conversation may have; None where that is not known yet."""
        return self.sequence_length

    def validate(self, context: DatasetBuildContext) -> None:
        """Refuse missing files, unknown names, a tokenizer that does not fit, and a first row that cannot be used."""
        from megatron.bridge.data.datasets.sft_plan import plan_sft

        super().validate(context)
        plan_sft(self, context)

    def build_train_valid_test_datasets(self, context: DatasetBuildContext) -> tuple[Split, Split, Split]:
        """Tokenize what has not been (rank 0; the others wait and read) and open the datasets.

        Every rank must call this. A refusal on rank 0 is raised on all.
        """
        from megatron.bridge.data.datasets.sft_build import build_splits

        return build_splits(self, context)
