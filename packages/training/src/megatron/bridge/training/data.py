"""From the configuration's dataset to the iterators of this rank."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron.bridge.data.epochs import Reshuffled
from megatron.bridge.data.loaders import build_data_iterator
from megatron.bridge.training.validation import dataset_context, run_tokenizer

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.state import Batches


def build_datasets(cfg: "ConfigContainer") -> tuple[Any, Any]:
    """The training and validation sets; the model takes the tokenizer's vocabulary when it has none of its own."""
    tokenizer = run_tokenizer(cfg)
    if cfg.model.vocab_size is None:
        cfg.model.vocab_size = tokenizer.vocab_size
    if getattr(cfg.dataset, "sequence_length", 0) is None:
        cfg.dataset.sequence_length = cfg.model.seq_length  # type: ignore[attr-defined]
    train, valid, _ = cfg.dataset.build_train_valid_test_datasets(dataset_context(cfg, tokenizer))
    return _in_order(cfg, train), valid


def _in_order(cfg: "ConfigContainer", train: Any) -> Any:
    return Reshuffled(train, cfg.rng.seed) if cfg.dataset.dataloader_type == "cyclic" else train


def batches_per_chunk(
    cfg: "ConfigContainer",
    dataset: Any,
    num_chunks: int,
    batch_size: int | Callable[[int], int],
    consumed_samples: int = 0,
) -> list["Batches"]:
    """One iterator per model chunk, each over the same micro-batches; None where the pipeline stage needs no data.

    Args:
        cfg: the run's configuration.
        dataset: to draw from.
        num_chunks: of this rank's model.
        batch_size: sequences per step, or a function that gives them from the samples drawn before.
        consumed_samples: where to begin.
    """
    from megatron.core import parallel_state

    ends = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
    # Attention on every stage asks where the documents of a packed sample begin.
    ends = ends or getattr(dataset, "packed", False)
    return [
        build_data_iterator(
            dataset,
            micro_batch_size=cfg.train.micro_batch_size,
            global_batch_size=batch_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            consumed_samples=consumed_samples,
            num_workers=cfg.dataset.num_workers,
            seed=cfg.rng.seed,
        )
        if ends
        else None
        for _ in range(num_chunks)
    ]
