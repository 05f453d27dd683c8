"""What pretraining recipes share: AdamW with a cosine schedule, the distributed optimizer, mock data."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def pretraining(
    model: Any,
    *,
    train_iters: int = 10_000,
    global_batch_size: int = 8,
    micro_batch_size: int = 1,
    lr: float = 3e-4,
    min_lr: float = 3e-5,
    data_paths: list[str] | None = None,
    tokenizer_model: str | None = None,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    sequence_parallel: bool = False,
) -> "ConfigContainer":
    """A pretraining run of `model`.

    Args:
        model: a model provider; the given parallel sizes are set on it.
        train_iters: optimizer steps; the warm-up takes the first hundredth of them.
        global_batch_size, micro_batch_size: sequences per step over all ranks, and per forward pass on one.
        lr, min_lr: learning rate after the warm-up, and at the end of the cosine.
        data_paths: prefixes of preprocessed text (`megatron-bridge data preprocess`); None for mock data.
        tokenizer_model: Hugging Face folder or id of the tokenizer of `data_paths`.
    """
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    from megatron.bridge.data.datasets.gpt import GPTDatasetConfig
    from megatron.bridge.training.config import ConfigContainer, SchedulerConfig, TokenizerConfig, TrainingConfig

    model.tensor_model_parallel_size = tensor_model_parallel_size
    model.pipeline_model_parallel_size = pipeline_model_parallel_size
    model.sequence_parallel = sequence_parallel
    return ConfigContainer(
        model=model,
        dataset=GPTDatasetConfig(data_paths=data_paths, mock=None, sequence_length=model.seq_length, split="99,1,0"),
        train=TrainingConfig(
            train_iters=train_iters, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size
        ),
        optimizer=OptimizerConfig(
            lr=lr,
            min_lr=min_lr,
            weight_decay=0.1,
            adam_beta1=0.9,
            adam_beta2=0.95,
            clip_grad=1.0,
            use_distributed_optimizer=True,
        ),
        scheduler=SchedulerConfig(lr_decay_style="cosine", lr_warmup_fraction=0.01),
        tokenizer=TokenizerConfig(tokenizer_model=tokenizer_model, vocab_size=model.vocab_size),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
    )
