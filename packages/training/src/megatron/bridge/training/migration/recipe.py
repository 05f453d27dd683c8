"""The recipe `megatron_lm`: a GPT model and a run as Megatron-LM has them without being told anything."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def megatron_lm() -> "ConfigContainer":
    """Megatron-LM's defaults; sizes, length and data are for a configuration file or overrides to say."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training import config as c

    return c.ConfigContainer(
        model=GPTModelProvider(
            num_layers=0,
            hidden_size=0,
            num_attention_heads=0,
            attention_softmax_in_fp32=False,
            position_embedding_type="learned_absolute",
            share_embeddings_and_output_weights=True,
        ),
        dataset=c.GPTDatasetConfig(split="969, 30, 1", num_workers=2),
        train=c.TrainingConfig(global_batch_size=1, eval_iters=100),
        optimizer=OptimizerConfig(min_lr=0.0),
        scheduler=c.SchedulerConfig(lr_decay_style="linear"),
        ddp=DistributedDataParallelConfig(),
        logger=c.LoggerConfig(log_interval=100),
    )
