"""The schedule of learning rate and weight decay: Megatron-Core's, built from `SchedulerConfig`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def build_scheduler(cfg: "ConfigContainer", optimizer: Any) -> Any:
    """Megatron-Core's `OptimizerParamScheduler`; it counts in samples, so that it survives a change of batch size.

    The configuration of this run decides the shape, on a resume too: a checkpoint gives the position alone.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    scheduler, steps = cfg.scheduler, decay_samples(cfg)
    start, end = weight_decay_range(cfg)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=scheduler.lr_warmup_init,
        max_lr=cfg.optimizer.lr,
        min_lr=cfg.optimizer.min_lr or 0.0,
        lr_warmup_steps=warmup_samples(cfg),
        lr_decay_steps=steps,
        lr_decay_style=scheduler.lr_decay_style,
        wsd_decay_steps=final_fall_samples(cfg),
        lr_wsd_decay_style=scheduler.lr_wsd_decay_style,
        start_wd=start,
        end_wd=end,
        wd_incr_steps=steps,
        wd_incr_style=scheduler.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def decay_samples(cfg: "ConfigContainer") -> int:
    """How many samples have been drawn when the lowest learning rate is reached."""
    scheduler = cfg.scheduler
    if scheduler.lr_decay_samples is not None:
        return scheduler.lr_decay_samples
    return cfg.train.batch_sizes.samples_after(scheduler.lr_decay_iters or cfg.train.total_iters)


def warmup_samples(cfg: "ConfigContainer") -> int:
    """Samples of warm-up."""
    scheduler = cfg.scheduler
    if scheduler.lr_warmup_samples is not None:
        return scheduler.lr_warmup_samples
    if scheduler.lr_warmup_fraction is not None:
        return int(scheduler.lr_warmup_fraction * decay_samples(cfg))
    return cfg.train.batch_sizes.samples_after(scheduler.lr_warmup_iters)


def final_fall_samples(cfg: "ConfigContainer") -> int | None:
    """Samples over which the learning rate of `WSD` falls, at the end of the decay; after a ramp, batches are whole."""
    scheduler = cfg.scheduler
    if scheduler.lr_wsd_decay_samples is not None or scheduler.lr_wsd_decay_iters is None:
        return scheduler.lr_wsd_decay_samples
    return scheduler.lr_wsd_decay_iters * cfg.train.global_batch_size


def weight_decay_range(cfg: "ConfigContainer") -> tuple[float, float]:
    """Weight decay at the beginning and at the end."""
    scheduler, plain = cfg.scheduler, cfg.optimizer.weight_decay
    ends = (scheduler.start_weight_decay, scheduler.end_weight_decay)
    start, end = (plain if value is None else value for value in ends)
    return start, end
