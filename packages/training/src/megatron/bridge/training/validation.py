"""What is wrong with a configuration, all of it at once, before anything heavy is built."""

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.checkpoint_layout import resolve, saved_iterations
from megatron.bridge.data.provider import DatasetBuildContext
from megatron.bridge.data.tokenizers import Tokenizer, build_tokenizer
from megatron.bridge.errors import BridgeError
from megatron.bridge.training.batch_sizes import ramp_problem
from megatron.bridge.training.comm_overlap import apply_overlap, engine_problems, overlap_problems
from megatron.bridge.training.engine import engine_of
from megatron.bridge.training.forward_steps import forward_step_problems
from megatron.bridge.training.hf_side import hf_start, is_hf_folder, kept_hf_files
from megatron.bridge.training.launching.base import EVERYTHING, Sight
from megatron.bridge.training.mixed_precision import apply_precision, precision_problems
from megatron.bridge.training.newest_whole import Found, newest_whole, resumed_path
from megatron.bridge.training.peft_section import peft_problems
from megatron.bridge.training.profiler import machine_problems, profiling_problems, rank_problems
from megatron.bridge.training.same_model import other_model_problems
from megatron.bridge.training.scheduler import decay_samples, final_fall_samples, warmup_samples, weight_decay_range
from megatron.bridge.training.secrets import secret_problems

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


class ConfigError(BridgeError):
    """A configuration cannot run, or an override cannot be applied."""


def validate(cfg: "ConfigContainer", world_size: int | None = None, sight: Sight = EVERYTHING) -> None:
    """Raise one `ConfigError` that lists every problem of `cfg`; see `ConfigContainer.validate`."""
    if world_size is None:
        from megatron.bridge import platform

        world_size = platform.world_size()
    try:
        apply_precision(cfg)
        apply_overlap(cfg)
        _apply_evaluation(cfg)
    except BridgeError as error:
        raise ConfigError(str(error)) from error
    checks = [*_CHECKS, *(check for what, those in _CHECKS_BY_SIGHT.items() if what in sight for check in those)]
    found = [problem for check in checks for problem in check(cfg)]
    found += [*_layout_problems(cfg, world_size), *rank_problems(cfg, world_size)]
    if found:
        raise ConfigError(report("the configuration cannot run", found))


def _apply_evaluation(cfg: "ConfigContainer") -> None:
    """The section `validation` decides about the fields of `train` that say the same."""
    for name in ("eval_interval", "eval_iters"):
        value = getattr(cfg.validation, name)
        if value is not None:
            setattr(cfg.train, name, value)


def report(headline: str, problems: list[str]) -> str:
    """One problem on one line; several as a list under a headline."""
    if len(problems) == 1:
        return f"{headline}: {problems[0]}"
    return f"{headline}, {len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)


def model_parallel_size(model: Any) -> int:
    """Ranks that hold one replica of the model: TP x PP x CP."""
    return int(
        model.tensor_model_parallel_size
        * model.pipeline_model_parallel_size
        * getattr(model, "context_parallel_size", 1)
    )


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


def chunks_of_sequence(model: Any) -> int:
    """Into how many chunks context-parallel ranks cut a sequence: two for each rank, 1 without them."""
    context = int(getattr(model, "context_parallel_size", 1))
    return 2 * context if context > 1 else 1


def run_tokenizer(cfg: "ConfigContainer") -> Tokenizer:
    """The run's tokenizer; one without a folder and a size takes the model's vocabulary."""
    config = cfg.tokenizer
    if config.tokenizer_model is None and config.vocab_size is None:
        config = dataclasses.replace(config, vocab_size=cfg.model.vocab_size)
    return build_tokenizer(config)


def _sizes(cfg: "ConfigContainer") -> Iterator[str]:
    positive = {
        "train.train_iters": cfg.train.train_iters,
        "train.train_samples": cfg.train.train_samples,
        "train.global_batch_size": cfg.train.global_batch_size,
        "train.micro_batch_size": cfg.train.micro_batch_size,
        "train.eval_interval": cfg.train.eval_interval,
        "train.eval_iters": cfg.train.eval_iters,
        "train.exit_duration_in_mins": cfg.train.exit_duration_in_mins,
        "train.exit_interval": cfg.train.exit_interval,
        "scheduler.lr_decay_samples": cfg.scheduler.lr_decay_samples,
        "logger.log_interval": cfg.logger.log_interval,
        "logger.peak_tflops": cfg.logger.peak_tflops,
        "checkpoint.save_interval": cfg.checkpoint.save_interval,
        "checkpoint.most_recent_k": cfg.checkpoint.most_recent_k,
        "fault_tolerance.loss_spike_threshold": cfg.fault_tolerance.loss_spike_threshold,
        "fault_tolerance.loss_spike_window": cfg.fault_tolerance.loss_spike_window,
        "dist.timeout_seconds": cfg.dist.timeout_seconds,
    }
    for name, value in positive.items():
        if value is not None and value <= 0:
            yield f"{name}={value} must be greater than 0"


def _has_length(cfg: "ConfigContainer") -> bool:
    """Whether the number and sizes of the steps are known; what follows from them can then be checked too."""
    return cfg.train.global_batch_size > 0 and not any(_lengths(cfg))


def _lengths(cfg: "ConfigContainer") -> Iterator[str]:
    """What is wrong with the run's length and the sizes of its steps."""
    train = cfg.train
    if train.global_batch_size <= 0:
        return
    ramp = train.rampup_batch_size
    problem = None if ramp is None else ramp_problem(train.global_batch_size, ramp)
    if problem is not None:
        yield problem
    elif train.train_iters is None and train.train_samples is None:
        yield "neither train.train_iters nor train.train_samples is set: say how long to train"
    elif train.train_iters is not None and train.train_samples is not None:
        yield "train.train_iters and train.train_samples are both set; set one of them to null"
    elif train.total_iters == 0 and (train.train_samples or 0) > 0:
        yield (
            f"train.train_samples={train.train_samples} is less than the first step takes, {train.batch_sizes.at(0)}"
        )
    if train.skip_train and train.eval_interval is None:
        yield "train.skip_train=True leaves the evaluation, and train.eval_interval is not set: there is nothing to do"


def parallel_problems(cfg: "ConfigContainer", world_size: int) -> Iterator[str]:
    """What is wrong with how model and batch are divided over ranks; only sizes of `model` and `train` are asked."""
    yield from _layout_problems(cfg, world_size)
    yield from _model_parts(cfg.model)


def _model_parts(model: Any) -> Iterator[str]:
    yield from _sequence_parts(model)
    if getattr(model, "num_moe_experts", None) and model.tensor_model_parallel_size > 1 and not model.sequence_parallel:
        yield (
            f"model.num_moe_experts={model.num_moe_experts} with model.tensor_model_parallel_size="
            f"{model.tensor_model_parallel_size} trains with model.sequence_parallel=true only; set it"
        )


def _layout_problems(cfg: "ConfigContainer", world_size: int) -> Iterator[str]:
    train, engine = cfg.train, engine_of(cfg)
    if misfits := list(engine.layout_problems(cfg, world_size)):
        yield from misfits
        return
    data_parallel = engine.replicas(cfg, world_size)
    step = train.micro_batch_size * data_parallel
    if not _has_length(cfg):
        return
    for _, size in train.batch_sizes.stages if step > 0 and train.rampup_batch_size else ():
        if size % step:
            yield (
                f"train.rampup_batch_size={train.rampup_batch_size} comes to {size} sequences, not a multiple of "
                f"train.micro_batch_size={train.micro_batch_size} x {data_parallel} data-parallel ranks = {step}"
            )
            return
    if step > 0 and train.global_batch_size % step:
        fitting = max(train.global_batch_size // step, 1) * step
        yield (
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{train.micro_batch_size} x {data_parallel} data-parallel ranks = {step}; {fitting} would do"
        )
        return
    for _, size in train.batch_sizes.stages:
        yield from _interleaving(cfg, size // step if step > 0 else 0)


def _interleaving(cfg: "ConfigContainer", num_microbatches: int) -> Iterator[str]:
    pipeline = cfg.model.pipeline_model_parallel_size
    if getattr(cfg.model, "virtual_pipeline_model_parallel_size", None) and num_microbatches % pipeline:
        yield (
            f"an interleaved pipeline needs the micro-batches per step to be a multiple of "
            f"pipeline_model_parallel_size={pipeline}, and there are {num_microbatches}; change "
            "train.global_batch_size or train.micro_batch_size"
        )


def _model(cfg: "ConfigContainer") -> Iterator[str]:
    model = cfg.model
    try:
        model.transformer_config()
    except BridgeError as error:
        yield f"model: {error}"
    yield from _model_parts(model)
    yield from _recompute(model)
    dtype = _dtype_name(model)
    for flag, name in _LOW_PRECISION.items():
        if (dtype == name) != bool(getattr(model, flag)):
            yield f"model.{flag}={getattr(model, flag)} and model.params_dtype={dtype} contradict each other; set both"


def _sequence_parts(model: Any) -> Iterator[str]:
    """Context-parallel ranks hold two chunks of every sequence each; under SP, tensor-parallel ranks divide those."""
    context = getattr(model, "context_parallel_size", 1)
    tensor = model.tensor_model_parallel_size if model.sequence_parallel else 1
    chunks = chunks_of_sequence(model)
    if chunks > 0 and tensor > 0 and (model.seq_length % chunks or model.seq_length // max(context, 1) % tensor):
        named = [f"2 x model.context_parallel_size={context}"] if context > 1 else []
        named += [f"model.tensor_model_parallel_size={tensor} (sequence_parallel)"] if tensor > 1 else []
        parts = chunks * tensor
        fitting = max(model.seq_length // parts, 1) * parts
        yield f"model.seq_length={model.seq_length} is not divided by {' and '.join(named)}; {fitting} would do"


# Modules whose outputs Megatron-Core gives up by a means that asks Transformer Engine for its state (0.19).
_RECOMPUTED_BY_ENGINE = ("layernorm", "moe_act", "mla_up_proj", "gdn_norm_out")


def _recompute(model: Any) -> Iterator[str]:
    named = set(model.recompute_modules or ()) if model.recompute_granularity == "selective" else set()
    if importlib.util.find_spec("transformer_engine") is None:
        for name in sorted(named.intersection(_RECOMPUTED_BY_ENGINE)):
            yield (
                f"model.recompute_modules names {name!r}, which Megatron-Core computes again only where Transformer "
                "Engine is installed; leave it out, or take recompute_granularity=full"
            )


_LOW_PRECISION = {"bf16": "bfloat16", "fp16": "float16"}


def _dtype_name(model: Any) -> str:
    return str(getattr(model, "params_dtype", "float32")).removeprefix("torch.")


def _optimizer(cfg: "ConfigContainer") -> Iterator[str]:
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
    for flag in _LOW_PRECISION:
        if getattr(optimizer, flag) and not getattr(cfg.model, flag):
            yield f"optimizer.{flag}=True, but model.{flag}=False; the model decides the precision, set it there"


def _scheduler(cfg: "ConfigContainer") -> Iterator[str]:
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
    if not _has_length(cfg):
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


def _data(cfg: "ConfigContainer") -> Iterator[str]:
    asked = getattr(cfg.dataset, "sequence_length", cfg.model.seq_length)
    if asked is not None and asked != cfg.model.seq_length:
        yield (
            f"dataset.sequence_length={asked} and model.seq_length={cfg.model.seq_length} differ; set both to the "
            "length of the sequences to train on"
        )
    known, embedded = cfg.tokenizer.vocab_size, cfg.model.vocab_size
    if known is not None and embedded is not None and known > embedded:
        yield f"tokenizer.vocab_size={known} is larger than model.vocab_size={embedded}: ids would have no embedding"
    if getattr(cfg.dataset, "packing", False):
        yield from _packing(cfg)
    if not _has_length(cfg):
        return
    try:
        cfg.dataset.validate(dataset_context(cfg, run_tokenizer(cfg)))
    except BridgeError as error:
        yield str(error)


def _packing(cfg: "ConfigContainer") -> Iterator[str]:
    model = cfg.model
    if cfg.train.micro_batch_size != 1:
        yield (
            f"dataset.packing=true takes train.micro_batch_size=1, not {cfg.train.micro_batch_size}; set it, and "
            "raise dataset.sequence_length and model.seq_length instead"
        )
    if getattr(model, "mtp_num_layers", None):
        yield "dataset.packing=true does not go with prediction layers; set model.mtp_num_layers=null or packing=false"
    if getattr(model, "layer_spec", None) == "local":
        yield "dataset.packing=true needs model.layer_spec 'torch' or 'transformer_engine'; 'local' cannot attend so"


def _checkpoint(cfg: "ConfigContainer") -> Iterator[str]:
    checkpoint = cfg.checkpoint
    for name in ("save_interval", "async_save", "most_recent_k", "save_hf"):
        if getattr(checkpoint, name) and checkpoint.save is None:
            yield f"checkpoint.{name} is set, but checkpoint.save is not: there is no folder to save into"
    if checkpoint.load is not None and checkpoint.pretrained_checkpoint is not None and cfg.peft is None:
        yield "checkpoint.load and checkpoint.pretrained_checkpoint are both set; keep one"
    if checkpoint.ckpt_step is not None and checkpoint.load is None:
        yield "checkpoint.ckpt_step is set, but checkpoint.load is not: there is no folder to take the iteration from"
    start: Found | None = None
    resumed, pretrained = resumed_path(checkpoint), checkpoint.pretrained_checkpoint
    try:
        start = None if resumed is None else newest_whole(resumed)
    except BridgeError as error:
        yield f"checkpoint.load: {error}"
    if start is not None:
        yield from other_model_problems("checkpoint.load", start.folder, cfg)
    try:
        if pretrained is not None:
            weights = Path(pretrained) if is_hf_folder(pretrained) else resolve(pretrained)
            yield from other_model_problems("checkpoint.pretrained_checkpoint", weights, cfg)
    except BridgeError as error:
        yield f"checkpoint.pretrained_checkpoint: {error}"
    if checkpoint.save is not None:
        refused = _refused_folder(Path(checkpoint.save))
        if refused:
            yield f"checkpoint.save={checkpoint.save!r}: {refused}; save into another folder"
        else:
            yield from _save_folder(Path(checkpoint.save), start)
    yield from _hf_side(cfg)


def _profiling(cfg: "ConfigContainer") -> Iterator[str]:
    if _has_length(cfg):
        yield from profiling_problems(cfg)


def _fault_tolerance(cfg: "ConfigContainer") -> Iterator[str]:
    settings = cfg.fault_tolerance
    for name in ("rerun_tolerance", "max_skips_in_a_row"):
        if getattr(settings, name) < 0:
            yield f"fault_tolerance.{name}={getattr(settings, name)} must not be negative"
    for name in ("check_for_nan_in_grad", "check_for_large_grads"):
        if settings.on_fault != "stop" and getattr(cfg.ddp, name):
            yield (
                f"ddp.{name}=True ends the run at once on the rank concerned, and fault_tolerance.on_fault is "
                f"{settings.on_fault!r}; leave ddp.{name} out"
            )
    if settings.on_fault != "rerun" and (settings.after_rerun != "stop" or settings.rerun_tolerance):
        yield "fault_tolerance.after_rerun and rerun_tolerance belong to on_fault='rerun'; set it, or leave them out"


def _logger(cfg: "ConfigContainer") -> Iterator[str]:
    from megatron.bridge.training.reporter import loggers_of

    for name in ("folder", "tensorboard_dir", "wandb_save_dir"):
        path = getattr(cfg.logger, name)
        if path is not None and (why := _refused_folder(Path(path))) is not None:
            yield f"logger.{name}={path!r} cannot be written: {why}"
    factor = cfg.logger.straggler_factor
    if factor is not None and factor <= 1:
        yield f"logger.straggler_factor={factor} must be greater than 1; 1.2 tells of ranks that take 20% longer"
    try:
        wanted = list(loggers_of(cfg))
    except BridgeError as error:
        yield f"logger.loggers: {error}"
        return
    for name, logger in wanted:
        if logger.needs is not None and importlib.util.find_spec(logger.needs[0]) is None:
            package, extra = logger.needs
            yield (
                f"the logger {name!r} needs the package {package}, which is not there: "
                f"uv pip install 'megatron-bridge-training[{extra}]'"
            )
        if logger.setting is not None and not logger.wanted(cfg):
            yield f"logger.loggers names {name!r}, which needs logger.{logger.setting}; set it, or leave {name!r} out"
    for name in cfg.logger.options.keys() - {name for name, _ in wanted}:
        yield f"logger.options has settings for {name!r}, which is none of the run's loggers; add it to logger.loggers"


def _hf_side(cfg: "ConfigContainer") -> Iterator[str]:
    for name in ("hf_save_path", "save_hf"):
        asked = getattr(cfg.checkpoint, name)
        if asked and not (getattr(cfg.model, "bridge", None) or hf_start(cfg) or kept_hf_files(cfg)):
            yield (
                f"checkpoint.{name} is set, and nothing tells which Hugging Face model this is; make the provider "
                "with AutoBridge.to_megatron_provider(), or start from a checkpoint that holds the Hugging Face files"
            )
    if cfg.checkpoint.hf_save_path is None:
        return
    folder = Path(cfg.checkpoint.hf_save_path)
    refused = "it is there already" if os.path.lexists(folder) else _refused_folder(folder)
    if refused:
        yield f"checkpoint.hf_save_path={str(folder)!r}: {refused}; write into another folder"


def _refused_folder(folder: Path) -> str | None:
    """Why nothing can be written into a folder that may not exist yet."""
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    if not place.is_dir():
        return f"{place} is not a folder"
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
        return f"this user may not write into {place}"
    return None


def _save_folder(save: Path, resumed: "Found | None") -> Iterator[str]:
    """A run never writes over another run's checkpoints, and says so before the first step, not after the last."""
    ahead = saved_iterations(save)
    if resumed is not None and resumed.folder.parent.resolve() == save.resolve():
        set_aside = {saved_iteration(folder) for folder in resumed.damaged}
        ahead = [number for number in ahead if number > saved_iteration(resumed.folder) and number not in set_aside]
    if ahead:
        yield (
            f"checkpoint.save={str(save)!r} already holds iteration {ahead[-1]}; resume from it with "
            f"checkpoint.load={str(save)!r}, or save into another folder"
        )


def saved_iteration(folder: Path) -> int:
    """The iteration of a checkpoint folder, 0 for a folder without one in its name."""
    from megatron.bridge.conversion.checkpoint_layout import iteration_of

    return iteration_of(folder) or 0


def _ranks(cfg: "ConfigContainer") -> Iterator[str]:
    from megatron.bridge.platform import cuda_available

    if cfg.dist.distributed_backend == "nccl" and not cuda_available():
        yield "dist.distributed_backend='nccl' needs a GPU, and there is none; leave it out, or use 'gloo'"
    if cfg.rng.te_rng_tracker and importlib.util.find_spec("transformer_engine") is None:
        yield "rng.te_rng_tracker=True needs Transformer Engine, which is not there; leave it out"


def _secrets(cfg: "ConfigContainer") -> Iterator[str]:
    from megatron.bridge.training.config_origins import values_of

    yield from secret_problems((each.key, each.value) for each in values_of(cfg))


_CHECKS = (
    _sizes,
    _lengths,
    _model,
    _optimizer,
    _scheduler,
    _fault_tolerance,
    _profiling,
    overlap_problems,
    _secrets,
    peft_problems,
    forward_step_problems,
)
# What can be proven only where the run's files, or the machine that it runs on, are.
_CHECKS_BY_SIGHT = {
    "files": (_data, _checkpoint, _logger),
    "machine": (precision_problems, machine_problems, engine_problems, _ranks),
}
