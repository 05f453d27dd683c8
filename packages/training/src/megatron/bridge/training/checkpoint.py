"""A run's checkpoints: model, optimizer, schedule, random state and data position, in Megatron-LM's key layout.

`save_checkpoint` and `load_checkpoint` work on the parts, for a loop of one's own; `save`, `restore` and `start_from`
on a `RunState`. How the files are written is `megatron.bridge.conversion.dist_checkpoint`'s business.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge import platform
from megatron.bridge.conversion import dist_checkpoint
from megatron.bridge.conversion.live_weights import as_chunks
from megatron.bridge.conversion.megatron_checkpoint import BESIDES_WEIGHTS, fill, model_state, state_keys
from megatron.bridge.conversion.rank_agreement import on_every_rank
from megatron.bridge.errors import BridgeError
from megatron.bridge.training.newest_whole import newest_whole, set_aside
from megatron.bridge.training.optimizer_state import load_optimizer_state, prepare_optimizer_state
from megatron.bridge.training.parameter_sync import whole_parameters
from megatron.bridge.training.peft_section import fill_trained_part, trained_part
from megatron.bridge.training.random_state import put_back, random_state
from megatron.bridge.training.side_files import side_files
from megatron.bridge.training.state import TrainProgress

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.state import RunState

# Tells Megatron-Core how to name and split what it saves: one tensor per parameter, whatever the layout. Megatron-Core
# adds process groups to the dict it is given, so it gets a copy.
_SHARDING: Mapping[str, Any] = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


def save_checkpoint(
    iteration: int,
    model: list[Any],
    optimizer: Any,
    scheduler: Any,
    cfg: "ConfigContainer",
    consumed_samples: int | None = None,
    logger_states: Mapping[str, Any] | None = None,
    guard_state: Mapping[str, Any] | None = None,
) -> Path:
    """Write `cfg.checkpoint.save/iter_XXXXXXX` with everything needed to go on, with its side files. Collective.

    Args:
        iteration: optimizer steps done.
        model: chunks of this rank, wrapped or not.
        optimizer, scheduler: None leaves them out.
        consumed_samples: training sequences drawn; None for those of `iteration` steps from the beginning.
        logger_states: by logger, what it needs to go on after a resume; rank 0's counts.
        guard_state: what the watch over faulty steps needs (`Guard.state_dict`).

    Returns:
        The finished folder.

    Raises:
        BridgeError: no folder is configured, or it cannot be written.
    """
    if cfg.checkpoint.save is None:
        raise BridgeError("checkpoint.save is not set: there is no folder to save the checkpoint into")
    drawn = cfg.train.batch_sizes.samples_after(iteration) if consumed_samples is None else consumed_samples
    state = _trained_state(model, cfg) | {
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "consumed_samples": drawn,
        "parallel_layout": _layout(),
        "rng_state": random_state(),
        "logger_states": dict(logger_states or {}),
        "guard_state": dict(guard_state or {}),
    }
    if optimizer is not None:
        prepare_optimizer_state(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(state, metadata=dict(_SHARDING))
    if scheduler is not None:
        state["opt_param_scheduler"] = scheduler.state_dict()
    with whole_parameters(model), tempfile.TemporaryDirectory() as scratch:
        beside = on_every_rank(
            lambda: side_files(cfg, Path(scratch)) if platform.is_rank_zero() else {}, "cannot describe the run"
        )
        return dist_checkpoint.save(
            cfg.checkpoint.save, iteration, state, side_files=beside, content_metadata=dict(_SHARDING)
        )


def load_checkpoint(model: list[Any], optimizer: Any, scheduler: Any, cfg: "ConfigContainer") -> TrainProgress:
    """Load `cfg.checkpoint.load` into the given parts, in place, at any TP, PP and DP. Collective.

    Random state is restored when the layout is the one that saved it, and seeded from the configuration otherwise.

    Args:
        optimizer, scheduler: None (or `checkpoint.load_optim=False`) leaves them as they are.

    Returns:
        How far the saved run was.

    Raises:
        BridgeError: no checkpoint, a damaged one, or one of another model; the message names the key or the file.
    """
    if cfg.checkpoint.load is None:
        raise BridgeError("checkpoint.load is not set: there is nothing to load from")
    return _progress(_load(newest_whole(cfg.checkpoint.load).folder, model, optimizer, scheduler, cfg))


def _progress(loaded: Mapping[str, Any]) -> TrainProgress:
    return TrainProgress(iteration=loaded["iteration"], consumed_samples=loaded["consumed_samples"])


def _load(folder: Path, model: list[Any], optimizer: Any, scheduler: Any, cfg: "ConfigContainer") -> Mapping[str, Any]:
    """Load one checkpoint folder into the parts; returns all that it held."""
    common = dist_checkpoint.load_common(folder)
    if "iteration" not in common:
        raise BridgeError(
            f"{folder} holds weights only, no training state; start from it with checkpoint.pretrained_checkpoint"
        )
    state = _trained_state(model, cfg)
    ignore: tuple[str, ...] = ()
    same_layout = common.get("parallel_layout") == _layout()
    if cfg.checkpoint.load_rng and same_layout:
        state["rng_state"] = random_state()
    else:
        ignore += ("rng_state",)
    if optimizer is not None and cfg.checkpoint.load_optim:
        prepare_optimizer_state(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=dict(_SHARDING))
    else:
        ignore += ("optimizer.",)
    loaded = dist_checkpoint.load(folder, state, ignore=ignore)
    _fill_trained(model, loaded, cfg)
    if "optimizer" in state:
        load_optimizer_state(optimizer, loaded["optimizer"])
    elif optimizer is not None:
        optimizer.reload_model_params()
    if scheduler is not None and cfg.checkpoint.load_optim:
        # `load_state_dict` steps forward from where the schedule stands.
        scheduler.num_steps = 0
        scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if "rng_state" in state:
        put_back(loaded["rng_state"])
    return common | {key: loaded[key] for key in ("iteration", "consumed_samples")}


def load_weights(model: list[Any], optimizer: Any, path: str | Path) -> None:
    """Load a checkpoint's weights alone, e.g. those that `AutoBridge.import_ckpt` converted. Collective."""
    loaded = dist_checkpoint.load(path, _model_state(model), ignore=BESIDES_WEIGHTS)
    fill(as_chunks(model), loaded)
    if optimizer is not None:
        optimizer.reload_model_params()


def save(run: "RunState") -> Path:
    """Save `run` as it is now."""
    progress = run.progress
    return save_checkpoint(
        progress.iteration,
        run.model,
        run.optimizer,
        run.scheduler,
        run.cfg,
        progress.consumed_samples,
        run.logger_states,
        run.guard.state_dict(),
    )


def restore(run: "RunState") -> None:
    """Put `run` where `checkpoint.load` left off.

    Raises:
        BridgeError: see `load_checkpoint`.
    """
    checkpoint = run.cfg.checkpoint
    assert checkpoint.load is not None
    found = newest_whole(checkpoint.load)
    loaded = _load(found.folder, run.model, run.optimizer, run.scheduler, run.cfg)
    run.progress = _progress(loaded)
    run.logger_states = dict(loaded.get("logger_states", {}))
    if loaded.get("guard_state"):
        run.guard.load_state_dict(loaded["guard_state"])
    run.notices += found.notices()
    if checkpoint.save is not None and Path(checkpoint.save).resolve() == Path(checkpoint.load).resolve():
        set_aside(found)


def start_from(run: "RunState") -> None:
    """Give a fresh run the weights of `checkpoint.pretrained_checkpoint`."""
    assert run.cfg.checkpoint.pretrained_checkpoint is not None
    load_weights(run.model, run.optimizer, run.cfg.checkpoint.pretrained_checkpoint)


def _model_state(model: list[Any]) -> dict[str, Any]:
    return model_state(as_chunks(model), _SHARDING)


def _trained_state(model: list[Any], cfg: "ConfigContainer") -> dict[str, Any]:
    """What a run saves: the whole model, or what a PEFT method trains."""
    chunks = as_chunks(model)
    state = _model_state(model)
    return state if cfg.peft is None else trained_part(state, chunks, state_keys(len(chunks)))


def _fill_trained(model: list[Any], loaded: Mapping[str, Any], cfg: "ConfigContainer") -> None:
    chunks = as_chunks(model)
    if cfg.peft is None:
        fill(chunks, loaded)
    else:
        fill_trained_part(chunks, loaded, state_keys(len(chunks)))


def _layout() -> dict[str, int]:
    from megatron.core import parallel_state

    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
    }
