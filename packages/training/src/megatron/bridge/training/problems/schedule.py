"""What is wrong with the optimizer, the learning rate and the weight decay."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron.bridge.training.problems.lengths import has_length
from megatron.bridge.training.problems.model import LOW_PRECISION
from megatron.bridge.training.scheduler import decay_samples, final_fall_samples, warmup_samples, weight_decay_range

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def optimizer_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """An optimizer that is not there, rates out of order, and flags that must agree."""
    optimizer, ddp = cfg.optimizer, cfg.ddp
    if optimizer.optimizer != "adam":
        yield f"optimizer.optimizer={optimizer.optimizer!r} is not supported; 'adam' (AdamW) is"
    if optimizer.lr is None or optimizer.lr <= 0:
        yield f"optimizer.lr={optimizer.lr} must be set and greater than 0"
    elif (optimizer.min_lr or 0.0) > optimizer.lr:
        yield f"optimizer.min_lr={optimizer.min_lr} is greater than optimizer.lr={optimizer.lr}"
    for name in ("use_distributed_optimizer", "overlap_param_gather"):
        if getattr(optimizer, name) != getattr(ddp, name):
            yield (
                f"optimizer.{name}={getattr(optimizer, name)} and ddp.{name}={getattr(ddp, name)} differ; "
                "set both to the same value"
            )
    for flag in LOW_PRECISION:
        if getattr(optimizer, flag) and not getattr(cfg.model, flag):
            yield f"optimizer.{flag}=True, but model.{flag}=False; the model decides the precision, set it there"


def scheduler_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """Phases of the learning rate that are set twice or do not fit into the run."""
    scheduler = cfg.scheduler
    pairs = [("lr_decay_iters", "lr_decay_samples"), ("lr_wsd_decay_iters", "lr_wsd_decay_samples")]
    pairs += [("lr_warmup_iters", "lr_warmup_fraction"), ("lr_warmup_iters", "lr_warmup_samples")]
    for one, other in (*pairs, ("lr_warmup_fraction", "lr_warmup_samples")):
        if getattr(scheduler, one) and getattr(scheduler, other) is not None:
            yield f"scheduler.{one} and scheduler.{other} are both set; keep one"
    if scheduler.lr_warmup_fraction is not None and not 0 <= scheduler.lr_warmup_fraction < 1:
        yield f"scheduler.lr_warmup_fraction={scheduler.lr_warmup_fraction} must lie in [0, 1)"
    if cfg.optimizer.lr is not None and scheduler.lr_warmup_init > cfg.optimizer.lr:
        yield f"scheduler.lr_warmup_init={scheduler.lr_warmup_init} is greater than optimizer.lr={cfg.optimizer.lr}"
    yield from _weight_decay(cfg)
    if not has_length(cfg):
        return
    decay, warmup = decay_samples(cfg), warmup_samples(cfg)
    if decay > 0 and not 0 <= warmup < decay:
        size = cfg.train.global_batch_size
        set_as = "lr_warmup_samples" if scheduler.lr_warmup_samples is not None else "lr_warmup_iters"
        length = f"{decay} samples" if set_as == "lr_warmup_samples" else f"{decay // size} steps"
        yield (
            f"scheduler.{set_as}={getattr(scheduler, set_as)} must be less than the {length} of the decay "
            "(scheduler.lr_decay_iters or lr_decay_samples, else the whole run)"
        )
    if scheduler.lr_decay_style == "inverse-square-root" and warmup <= 0:
        yield "scheduler.lr_decay_style='inverse-square-root' falls from the end of the warm-up; set lr_warmup_iters"
    yield from _final_fall(cfg, decay - warmup)


def _final_fall(cfg: "ConfigContainer", longest: int) -> Iterator[str]:
    scheduler, size = cfg.scheduler, cfg.train.global_batch_size
    by_samples = scheduler.lr_wsd_decay_samples is not None
    set_as = "lr_wsd_decay_samples" if by_samples else "lr_wsd_decay_iters"
    falling = getattr(scheduler, set_as)
    if scheduler.lr_decay_style != "WSD":
        if falling is not None:
            yield (
                f"scheduler.{set_as}={falling} belongs to lr_decay_style='WSD', and that is "
                f"{scheduler.lr_decay_style!r}; change one of them"
            )
    elif falling is None:
        yield "scheduler.lr_decay_style='WSD' needs scheduler.lr_wsd_decay_iters, the number of steps of its fall"
    elif not 0 < (final_fall_samples(cfg) or 0) <= longest:
        unit = f"{longest} samples" if by_samples else f"{longest // size} steps"
        yield (
            f"scheduler.{set_as}={falling} must lie between 1 and the {unit} that the decay "
            "(scheduler.lr_decay_iters or lr_decay_samples, else the whole run) leaves after the warm-up"
        )


def _weight_decay(cfg: "ConfigContainer") -> Iterator[str]:
    (start, end), style = weight_decay_range(cfg), cfg.scheduler.weight_decay_incr_style
    if not 0 <= start <= end:
        yield f"the weight decay goes from {start} to {end}; it must not be negative, nor fall: swap or change the two"
    elif style == "constant" and start != end:
        yield (
            f"the weight decay goes from {start} to {end}, and scheduler.weight_decay_incr_style is 'constant'; set it "
            "to 'linear' or 'cosine'"
        )
