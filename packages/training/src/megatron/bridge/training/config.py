"""The configuration of a run: small dataclasses, ours and Megatron-Core's, in one `ConfigContainer`.

Importing this module imports neither torch nor Megatron-Core: `OptimizerConfig` and `DistributedDataParallelConfig` are
Megatron-Core's own and are loaded when they are first asked for.
"""

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megatron.bridge.data.provider import DatasetBuildContext, DatasetProvider
from megatron.bridge.data.tokenizers.config import TokenizerConfig
from megatron.bridge.training.batch_sizes import BatchSizes, batch_sizes
from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.launching.base import EVERYTHING, Sight
from megatron.bridge.training.mixed_precision import MixedPrecisionConfig

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    from megatron.bridge.data.datasets.gpt import GPTDatasetConfig
    from megatron.bridge.data.datasets.sft import SFTDatasetConfig

_LAZY = {
    "DistributedDataParallelConfig": "megatron.core.distributed",
    "OptimizerConfig": "megatron.core.optimizer",
    "GPTDatasetConfig": "megatron.bridge.data.datasets.gpt",
    "SFTDatasetConfig": "megatron.bridge.data.datasets.sft",
}

__all__ = [
    "CheckpointConfig",
    "CommOverlapConfig",
    "ConfigContainer",
    "DatasetBuildContext",
    "DatasetProvider",
    "DistributedDataParallelConfig",
    "DistributedInitConfig",
    "FaultToleranceConfig",
    "GPTDatasetConfig",
    "LoggerConfig",
    "MixedPrecisionConfig",
    "OptimizerConfig",
    "ProfilingConfig",
    "RNGConfig",
    "SFTDatasetConfig",
    "SchedulerConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "ValidationConfig",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(kw_only=True)
class TrainingConfig:
    """How long to train and on how much at a time.

    Attributes:
        train_iters: optimizer steps of the whole run, those before a resume included.
        train_samples: the length of the run in sequences instead; it ends with the last whole step within them.
        global_batch_size: sequences per optimizer step, over all ranks.
        rampup_batch_size: `[start, increment, samples]`: the first step takes `start` sequences, and in equal parts of
            the first `samples` the number grows by `increment` up to `global_batch_size`; None for no ramp.
        micro_batch_size: sequences per forward pass on one rank.
        eval_interval: steps between evaluations on the validation split; None for no evaluation.
        eval_iters: global batches per evaluation.
        exit_signal_handler: on Ctrl-C or SIGTERM finish the step, save, and return; a second Ctrl-C interrupts.
        exit_duration_in_mins: stop in the same way after this many minutes; None for no limit.
        exit_interval: stop in the same way after a step whose number this divides; None for no such step.
        skip_train: evaluate once on the validation split and do no step.
        forward_step: name of the group `megatron.bridge.forward_steps`, for a run that is given no function; None where
            it always is.
    """

    train_iters: int | None = None
    train_samples: int | None = None
    global_batch_size: int
    rampup_batch_size: list[int] | None = None
    micro_batch_size: int = 1
    eval_interval: int | None = None
    eval_iters: int = 10
    exit_signal_handler: bool = True
    exit_duration_in_mins: float | None = None
    exit_interval: int | None = None
    skip_train: bool = False
    forward_step: str | None = "gpt"

    @property
    def batch_sizes(self) -> BatchSizes:
        """How many sequences each step takes."""
        return batch_sizes(self.global_batch_size, self.rampup_batch_size)

    @property
    def total_iters(self) -> int:
        """Optimizer steps of the whole run."""
        if self.train_iters is not None:
            return self.train_iters
        return 0 if self.train_samples is None else self.batch_sizes.iterations_within(self.train_samples)


@dataclass(kw_only=True)
class ValidationConfig:
    """Evaluation, in a section of its own: what is set here takes the place of the same fields of `train`.

    Attributes:
        eval_interval: steps between evaluations on the validation split.
        eval_iters: global batches per evaluation.
    """

    eval_interval: int | None = None
    eval_iters: int | None = None


@dataclass(kw_only=True)
class SchedulerConfig:
    """How learning rate and weight decay move from step to step (Megatron-Core's `OptimizerParamScheduler`).

    Attributes:
        lr_decay_style: shape after the warm-up, from `optimizer.lr` to `optimizer.min_lr` (None counts as 0). `WSD`
            stays at `optimizer.lr` and falls at the end (arXiv:2404.06395); `inverse-square-root` falls as
            1 / sqrt(step) from the end of the warm-up on (arXiv:1706.03762).
        lr_decay_iters: step at which `optimizer.min_lr` is reached; None for the whole run.
        lr_wsd_decay_iters: how many of these steps the fall of `WSD` takes.
        lr_wsd_decay_style: shape of that fall.
        lr_warmup_iters: steps of linear warm-up.
        lr_warmup_fraction: the same as a fraction of the decay; set one of the two.
        lr_decay_samples, lr_wsd_decay_samples, lr_warmup_samples: the same lengths in sequences instead of steps.
        lr_warmup_init: learning rate of the first step of the warm-up.
        start_weight_decay, end_weight_decay: where the weight decay goes from and to, over `lr_decay_iters`; None for
            `optimizer.weight_decay`.
        weight_decay_incr_style: shape of that way; `constant` needs both ends equal.
    """

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    lr_decay_iters: int | None = None
    lr_wsd_decay_iters: int | None = None
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    lr_warmup_iters: int = 0
    lr_warmup_fraction: float | None = None
    lr_decay_samples: int | None = None
    lr_wsd_decay_samples: int | None = None
    lr_warmup_samples: int | None = None
    lr_warmup_init: float = 0.0
    start_weight_decay: float | None = None
    end_weight_decay: float | None = None
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"


@dataclass(kw_only=True)
class CheckpointConfig:
    """Where to start from and what to keep.

    Attributes:
        save: folder for this run's checkpoints; None saves nothing.
        save_interval: steps between checkpoints; the last step is saved in any case.
        async_save: write in the background while training goes on, from copies of the tensors in host memory; the bytes
            are those of the step that is saved. The last save of a run is waited for.
        most_recent_k: how many of this run's newest checkpoints to keep; None keeps all. An older one goes only after a
            newer one was verified.
        save_retries: how often a save that failed is tried again, after a second, two, four, ...
        go_on_without: whether training goes on after a save that failed for good; the last one of a run must not fail.
        load: checkpoint root or iteration folder to resume from, with optimizer, schedule and data position. Under a
            root the newest that is whole is taken, and what is wrong with newer ones is told.
        ckpt_step: iteration under the root `load` to resume from, instead of the newest.
        load_optim: restore optimizer and schedule too.
        load_rng: restore the random state too (where the parallel layout is the same).
        pretrained_checkpoint: what a fresh run takes its weights from: a Megatron checkpoint (made by
            `AutoBridge.import_ckpt`, by a run, or by Megatron-LM's torch_dist format), or a Hugging Face folder.
        hf_save_path: Hugging Face folder to write when the run has done all its steps.
        save_hf: make of `hf/` in each checkpoint, which describes the model, a whole Hugging Face folder with weights,
            those of an adapter merged into the others. They are written at once, also under `async_save`.
    """

    save: str | None = None
    save_interval: int | None = None
    async_save: bool = False
    most_recent_k: int | None = None
    save_retries: int = 2
    go_on_without: bool = False
    load: str | None = None
    ckpt_step: int | None = None
    load_optim: bool = True
    load_rng: bool = True
    pretrained_checkpoint: str | None = None
    hf_save_path: str | None = None
    save_hf: bool = False


@dataclass(kw_only=True)
class LoggerConfig:
    """What is reported, and where.

    Attributes:
        log_interval: steps between progress lines (where the output is no terminal) and `metrics.jsonl` records.
        folder: folder of `metrics.jsonl`; None for `checkpoint.save`, and no file when that is None too.
        progress: show progress on rank 0.
        tensorboard_dir: folder for TensorBoard's event files; needs the extra `tensorboard`. None writes none.
        wandb_project: Weights & Biases project; needs the extra `wandb`. None sends nothing.
        wandb_entity, wandb_exp_name: team and name of the run there; None leaves them to wandb.
        wandb_save_dir: folder for wandb's own files; None leaves it to wandb.
        mlflow_experiment: MLflow experiment; needs the extra `mlflow`. None records nothing.
        mlflow_tracking_uri, mlflow_run_name: server or folder, and name of the run there; None leaves them to MLflow.
        peak_tflops: what a device can do at most, for model FLOPs utilisation; None for what is known of the device.
        straggler_factor: tell when a rank takes this many times as long as the median rank to wait for data or to
            compute a step's gradients, over the steps since the last progress line; None never does.
        loggers: names of the group `megatron.bridge.loggers`, instead of those that the settings above ask for.
        options: settings by logger, for loggers of other packages.
    """

    log_interval: int = 1
    folder: str | None = None
    progress: bool = True
    tensorboard_dir: str | None = None
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_exp_name: str | None = None
    wandb_save_dir: str | None = None
    mlflow_experiment: str | None = None
    mlflow_tracking_uri: str | None = None
    mlflow_run_name: str | None = None
    peak_tflops: float | None = None
    straggler_factor: float | None = None
    loggers: list[str] | None = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(kw_only=True)
class FaultToleranceConfig:
    """What happens when a step goes wrong: its loss or gradient is NaN or infinite, or its loss leaps.

    Attributes:
        on_fault: `stop` ends the run with an error; `skip` leaves the update out, and the batch counts as used; `rerun`
            does the step again from the same weights, data and random state, and says whether the machine or model and
            data are at fault.
        after_rerun: `stop` ends the run then; `continue` takes the second result where it is sound, and leaves the
            update out where it is not.
        rerun_tolerance: largest relative difference of loss and gradient norm at which two results count as equal; more
            than 0 is for kernels that are not deterministic.
        max_skips_in_a_row: steps in a row that may be left out; one more ends the run.
        loss_spike_threshold: a loss leaps when it lies above the median of the last ones by this many deviations
            (median absolute ones, as standard deviations, and at least 1% of the median); None lets it leap.
        loss_spike_window: how many of the last losses those are; nothing leaps before there are as many.
    """

    on_fault: Literal["stop", "skip", "rerun"] = "stop"
    after_rerun: Literal["stop", "continue"] = "stop"
    rerun_tolerance: float = 0.0
    max_skips_in_a_row: int = 3
    loss_spike_threshold: float | None = None
    loss_spike_window: int = 32


@dataclass(kw_only=True)
class ProfilingConfig:
    """Which steps to profile, on which ranks and with what. Files go to `profiles/` in `logger.folder`.

    Attributes:
        use_pytorch_profiler: torch's profiler: a trace for https://ui.perfetto.dev, phases and operators named.
        use_nsys_profiler: ranges for `nsys profile --capture-range=cudaProfilerApi`; needs CUDA.
        record_memory_history: a snapshot of device memory for https://pytorch.org/memory_viz; needs CUDA.
        profile_step_start: steps before the first one to be profiled.
        profile_step_end: the last step to be profiled.
        profile_ranks: ranks to profile.
        record_shapes: name the operators' input shapes too.
    """

    use_pytorch_profiler: bool = False
    use_nsys_profiler: bool = False
    record_memory_history: bool = False
    profile_step_start: int = 10
    profile_step_end: int = 12
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    record_shapes: bool = False


@dataclass(kw_only=True)
class RNGConfig:
    """Random state.

    Attributes:
        seed: of weights, dropout and the order of data loading.
        te_rng_tracker: keep the random states of model-parallel regions in Transformer Engine's tracker, which CUDA
            graphs need.
        data_parallel_random_init: data-parallel replicas draw random numbers of their own, e.g. for dropout, each from
            `seed` + 10 x its number. They start from the first one's weights all the same.
    """

    seed: int = 1234
    te_rng_tracker: bool = False
    data_parallel_random_init: bool = False


@dataclass(kw_only=True)
class DistributedInitConfig:
    """How ranks meet.

    Attributes:
        timeout_seconds: how long a collective waits for an absent rank before the run fails.
        distributed_backend: `nccl` or `gloo`; None for what the machine has.
    """

    timeout_seconds: float = 600.0
    distributed_backend: Literal["nccl", "gloo"] | None = None


def _optimizer() -> "OptimizerConfig":
    from megatron.core.optimizer import OptimizerConfig

    return OptimizerConfig(lr=3e-4, min_lr=3e-5, weight_decay=0.1, adam_beta2=0.95, clip_grad=1.0)


def _ddp() -> "DistributedDataParallelConfig":
    from megatron.core.distributed import DistributedDataParallelConfig

    return DistributedDataParallelConfig()


@dataclass(kw_only=True)
class ConfigContainer:
    """Everything that defines a run.

    Attributes:
        model: a model provider, e.g. from `AutoBridge.to_megatron_provider()`.
        dataset: a `DatasetProvider`.
        mixed_precision: the precision by name; a plain name stands for a `MixedPrecisionConfig` of it.
        peft: a PEFT method (`LoRA(dim=16)`) that trains little beside the model's own weights, which stay and are no
            part of the checkpoints; None trains them all. Written `peft=lora peft.dim=16`.
    """

    model: Any
    dataset: DatasetProvider
    train: TrainingConfig
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    optimizer: "OptimizerConfig" = field(default_factory=_optimizer)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    ddp: "DistributedDataParallelConfig" = field(default_factory=_ddp)
    mixed_precision: MixedPrecisionConfig = field(default_factory=MixedPrecisionConfig)
    comm_overlap: CommOverlapConfig = field(default_factory=CommOverlapConfig)
    fault_tolerance: FaultToleranceConfig = field(default_factory=FaultToleranceConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    rng: RNGConfig = field(default_factory=RNGConfig)
    dist: DistributedInitConfig = field(default_factory=DistributedInitConfig)
    peft: Any = None

    def validate(self, world_size: int | None = None, sight: Sight = EVERYTHING) -> None:
        """Refuse what cannot run, before anything is built; all problems are reported at once.

        Args:
            world_size: number of ranks to check the parallel layout against; None for this process's world.
            sight: what of the place where it will run can be looked at from here.

        Raises:
            ConfigError: lists every problem with its remedy.
        """
        from megatron.bridge.training.validation import validate

        validate(self, world_size, sight)
