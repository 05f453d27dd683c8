"""What a run asks of its data: tokenizer, numbers of samples, chunks of a sequence."""

import dataclasses
from typing import TYPE_CHECKING

from megatron.bridge.data.provider import DatasetBuildContext
from megatron.bridge.data.tokenizers import Tokenizer, build_tokenizer
from megatron.bridge.training.problems.layout import chunks_of_sequence

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def dataset_context(cfg: "ConfigContainer", tokenizer: Tokenizer) -> DatasetBuildContext:
    """What the run asks of its data: every step's samples, and those of one evaluation."""
    train = cfg.train
    evaluated = train.eval_iters * train.global_batch_size if train.eval_interval else 0
    return DatasetBuildContext(
        train_samples=train.batch_sizes.samples_after(train.total_iters),
        valid_samples=evaluated,
        tokenizer=tokenizer,
        document_multiple=chunks_of_sequence(cfg.model),
    )


def run_tokenizer(cfg: "ConfigContainer") -> Tokenizer:
    """The run's tokenizer; one without a folder and a size takes the model's vocabulary."""
    config = cfg.tokenizer
    if config.tokenizer_model is None and config.vocab_size is None:
        config = dataclasses.replace(config, vocab_size=cfg.model.vocab_size)
    return build_tokenizer(config)
