"""The schedule of learning rate and weight decay: Megatron-Core's, built from `SchedulerConfig`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def build_scheduler(cfg: "ConfigContainer", optimizer: Any) -> Any:
    """Megatron-Core's `OptimizerParamScheduler`; it counts in samples, so that it survives a change of batch size.

    The configuration of this run decides the shape, on a resume too: a checkpoint gives the position alone.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    scheduler, batch = cfg.scheduler, cfg.train.global_batch_size
    steps = decay_iters(cfg) * batch
    start, end = weight_decay_range(cfg)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=scheduler.lr_warmup_init,
        max_lr=cfg.optimizer.lr,
        min_lr=cfg.optimizer.min_lr or 0.0,
        lr_warmup_steps=int(warmup_iters(cfg) * batch),
        lr_decay_steps=steps,
        lr_decay_style=scheduler.lr_decay_style,
        wsd_decay_steps=None if scheduler.lr_wsd_decay_iters is None else scheduler.lr_wsd_decay_iters * batch,
        lr_wsd_decay_style=scheduler.lr_wsd_decay_style,
        start_wd=start,
        end_wd=end,
        wd_incr_steps=steps,
        wd_incr_style=scheduler.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def decay_iters(cfg: "ConfigContainer") -> int:
    """The step at which the lowest learning rate is reached."""
    return cfg.scheduler.lr_decay_iters or cfg.train.train_iters


def warmup_iters(cfg: "ConfigContainer") -> float:
    """Steps of warm-up."""
    fraction = cfg.scheduler.lr_warmup_fraction
    return cfg.scheduler.lr_warmup_iters if fraction is None else fraction * decay_iters(cfg)


def weight_decay_range(cfg: "ConfigContainer") -> tuple[float, float]:
    """Weight decay at the beginning and at the end."""
    scheduler, plain = cfg.scheduler, cfg.optimizer.weight_decay
    ends = (scheduler.start_weight_decay, scheduler.end_weight_decay)
    start, end = (plain if value is None else value for value in ends)
    return start, end
