"""The learning-rate schedule: Megatron-Core's, built from `SchedulerConfig`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def build_scheduler(cfg: "ConfigContainer", optimizer: Any) -> Any:
    """Megatron-Core's `OptimizerParamScheduler`; it counts in samples, so that it survives a change of batch size.

    The configuration of this run decides the shape, on a resume too: a checkpoint gives the position alone.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    scheduler, batch = cfg.scheduler, cfg.train.global_batch_size
    decay_iters = scheduler.lr_decay_iters or cfg.train.train_iters
    warmup = scheduler.lr_warmup_iters * batch
    if scheduler.lr_warmup_fraction is not None:
        warmup = int(scheduler.lr_warmup_fraction * decay_iters * batch)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=scheduler.lr_warmup_init,
        max_lr=cfg.optimizer.lr,
        min_lr=cfg.optimizer.min_lr or 0.0,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay_iters * batch,
        lr_decay_style=scheduler.lr_decay_style,
        start_wd=cfg.optimizer.weight_decay,
        end_wd=cfg.optimizer.weight_decay,
        wd_incr_steps=decay_iters * batch,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
