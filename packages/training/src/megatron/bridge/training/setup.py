"""From a configuration to a run that is ready for its first step."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.bridge.training.auxiliary_losses import start_recording
from megatron.bridge.training.callbacks import Callback, Callbacks
from megatron.bridge.training.checkpoint import load_weights, restore, starting_point
from megatron.bridge.training.data import build_datasets, training_batches
from megatron.bridge.training.determinism import deterministic
from megatron.bridge.training.engine import engine_of
from megatron.bridge.training.hf_export import ExportHF
from megatron.bridge.training.hf_side import load_hf
from megatron.bridge.training.peft_section import adapted_notices, apply_peft, is_adapted, optimizer_overrides
from megatron.bridge.training.scheduler import build_scheduler
from megatron.bridge.training.state import RunState
from megatron.bridge.training.step import finish_gradients

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


@contextlib.contextmanager
def distributed(cfg: "ConfigContainer") -> Iterator[None]:
    """torch.distributed and Megatron's process groups for `cfg`; what existed before stays when the block ends well.

    With `model.deterministic_mode` torch works deterministically within the block (`determinism`).

    After an error nothing is taken down: a peer may hang, and taking down waits for it.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron.bridge import platform

    had_world, had_groups = dist.is_initialized(), parallel_state.is_initialized()
    with deterministic(cfg.model.deterministic_mode):
        platform.initialize_distributed(cfg.dist.timeout_seconds, cfg.dist.distributed_backend)
        yield
    engine_of(cfg).stop()
    if not had_groups and parallel_state.is_initialized():
        platform.destroy_model_parallel()
    if not had_world:
        platform.destroy_distributed()


def setup(cfg: "ConfigContainer", callbacks: Sequence[Callback] = ()) -> RunState:
    """Validate `cfg`, then build data, model, optimizer and schedule, and load what the run starts from. Collective.

    Raises:
        BridgeError: anything that cannot work; data and checkpoints are checked before the model is built.
    """
    from megatron.bridge import platform

    cfg.validate(platform.world_size())
    if not platform.cuda_available():
        platform.keep_freed_memory()
    seed_everything(cfg.rng.seed)
    if cfg.rng.te_rng_tracker:
        cfg.model.use_te_rng_tracker = True
    cfg.model.initialize_model_parallel(cfg.rng.seed)
    start_recording()
    train_set, valid_set = build_datasets(cfg)
    start = starting_point(cfg)
    model = cfg.model.provide_distributed_model(
        ddp_config=cfg.ddp,
        wrap_with_ddp=True,
        pre_wrap_hook=partial(apply_peft, cfg) if is_adapted(cfg) else None,
        seed=_seed_of_replica(cfg),
    )
    optimizer = build_optimizer(cfg, model)
    scheduler = build_scheduler(cfg, optimizer)
    run = RunState(cfg, model, optimizer, scheduler, [], valid_set)
    export = cfg.checkpoint.hf_save_path
    run.callbacks = Callbacks([*callbacks, *([ExportHF(export)] if export is not None else [])])
    run.notices += getattr(train_set, "notices", ())
    connect(run)
    if start is not None and cfg.checkpoint.load is not None:
        restore(run, start)
    elif is_adapted(cfg):
        run.notices += adapted_notices(cfg)  # the weights came before the method did
    elif start is not None:
        load_weights(model, optimizer, start.folder)
    elif cfg.checkpoint.pretrained_checkpoint is not None:
        load_hf(cfg, model, optimizer)
    run.train_data = [run.phases.waiting(each) for each in training_batches(run, train_set)]
    return run


def _seed_of_replica(cfg: "ConfigContainer") -> int:
    """The seed of this rank's replica, with which Python, NumPy and torch are seeded anew where it is its own."""
    from megatron.core import parallel_state

    if not cfg.rng.data_parallel_random_init:
        return cfg.rng.seed
    # As far apart as Megatron-LM's.
    seed: int = cfg.rng.seed + 10 * parallel_state.get_data_parallel_rank()
    seed_everything(seed)
    return seed


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; Megatron's own tracker is seeded with the process groups."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build_optimizer(cfg: "ConfigContainer", model: list[Any]) -> Any:
    """Megatron-Core's optimizer for `model`, in the model's precision; `cfg.optimizer` itself is left as it is."""
    values = {"bf16": cfg.model.bf16, "fp16": cfg.model.fp16, "params_dtype": cfg.model.params_dtype}
    # Megatron-Core's schedule takes the lowest rate from here and cannot do without one.
    values["min_lr"] = cfg.optimizer.min_lr or 0.0
    settings = dataclasses.replace(cfg.optimizer, **values)
    return engine_of(cfg).build_optimizer(settings, model, optimizer_overrides(cfg, settings))


def connect(run: RunState) -> None:
    """Tell Megatron-Core's schedule how to scale the loss and how to finish and overlap gradient reduction."""
    from megatron.core.utils import get_model_config

    model = run.model
    config = get_model_config(model[0])
    config.grad_scale_func = run.optimizer.scale_loss
    config.finalize_model_grads_func = partial(finish_gradients, run)
    if model[0].ddp_config.overlap_grad_reduce:
        waits = [chunk.no_sync for chunk in model]
        config.no_sync_func = waits if len(model) > 1 else waits[0]
    if model[0].ddp_config.overlap_param_gather and model[0].ddp_config.align_param_gather:
        starts = [chunk.start_param_sync for chunk in model]
        config.param_sync_func = starts if len(model) > 1 else starts[0]
