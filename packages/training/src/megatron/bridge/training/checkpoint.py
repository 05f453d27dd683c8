"""A run's checkpoints: model, optimizer, schedule, random state and data position, in Megatron-LM's key layout.

`save_checkpoint` and `load_checkpoint` work on the parts, for a loop of one's own; `start_save` and
`restore` on a `RunState`. How the files are written is `megatron.bridge.conversion.dist_checkpoint`'s business.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge import platform
from megatron.bridge.conversion import dist_checkpoint
from megatron.bridge.conversion.checkpoint_layout import resolve
from megatron.bridge.conversion.live_weights import as_chunks
from megatron.bridge.conversion.megatron_checkpoint import BESIDES_WEIGHTS, fill, model_state, state_keys
from megatron.bridge.conversion.rank_agreement import on_every_rank
from megatron.bridge.errors import BridgeError
from megatron.bridge.training.data import stream_states as states_of_streams
from megatron.bridge.training.engine import engine_of
from megatron.bridge.training.hf_side import is_hf_folder, write_hf_folder
from megatron.bridge.training.newest_whole import Found, newest_whole, resumed_path, set_aside
from megatron.bridge.training.parameter_sync import whole_parameters
from megatron.bridge.training.peft_section import fill_trained_part, is_adapted, trained_part
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
    stream_states: Sequence[bytes] = (),
) -> Path:
    """Write `cfg.checkpoint.save/iter_XXXXXXX` with everything needed to go on, with its side files. Collective.

    Args:
        iteration: optimizer steps done.
        model: chunks of this rank, wrapped or not.
        optimizer, scheduler: None leaves them out.
        consumed_samples: training sequences drawn; None for those of `iteration` steps from the beginning.
        logger_states: by logger, what it needs to go on after a resume; rank 0's counts.
        guard_state: what the watch over faulty steps needs (`Guard.state_dict`).
        stream_states: see `TrainProgress`; rank 0's count.

    Returns:
        The finished folder.

    Raises:
        BridgeError: no folder is configured, or it cannot be written.
    """
    drawn = cfg.train.batch_sizes.samples_after(iteration) if consumed_samples is None else consumed_samples
    held = {
        "logger_states": dict(logger_states or {}),
        "guard_state": dict(guard_state or {}),
        "stream_states": list(stream_states),
    }
    parts = model, optimizer, scheduler
    with tempfile.TemporaryDirectory() as scratch:
        saving = _start_save(TrainProgress(iteration, drawn), *parts, cfg, held, Path(scratch), False)
        saving.write()
        return saving.finish()


def start_save(run: "RunState", scratch: Path) -> dist_checkpoint.CheckpointSave:
    """Begin to save `run` as it is now; call `write()` and then `finish()` on what is returned. Collective.

    With `checkpoint.async_save` a thread writes, and the run may go on between the two.

    Args:
        scratch: an empty folder that stays until the save is over.

    Raises:
        BridgeError: no folder is configured, or the run cannot be described.
    """
    in_background = run.cfg.checkpoint.async_save
    parts = run.model, run.optimizer, run.scheduler
    run.progress.stream_states = states_of_streams(run.cfg, run.streams)
    held = {
        "logger_states": dict(run.logger_states),
        "guard_state": dict(run.guard.state_dict()),
        "stream_states": run.progress.stream_states,
    }
    return _start_save(run.progress, *parts, run.cfg, held, scratch, in_background)


def _start_save(
    progress: TrainProgress,
    model: list[Any],
    optimizer: Any,
    scheduler: Any,
    cfg: "ConfigContainer",
    held: Mapping[str, Any],
    scratch: Path,
    background: bool,
) -> dist_checkpoint.CheckpointSave:
    if cfg.checkpoint.save is None:
        raise BridgeError("checkpoint.save is not set: there is no folder to save the checkpoint into")
    engine = engine_of(cfg)
    with whole_parameters(model):
        state = _trained_state(model, cfg) | {
            "checkpoint_version": 3.0,
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "parallel_layout": engine.layout(cfg),
            "distributed_optimizer": cfg.ddp.use_distributed_optimizer,
            "rng_state": random_state(engine, cfg),
            **held,
        }
        if optimizer is not None:
            state["optimizer"] = engine.optimizer_state(optimizer, state, _SHARDING)
        if scheduler is not None:
            state["opt_param_scheduler"] = scheduler.state_dict()
        prepared = None
        if cfg.checkpoint.save_hf:
            prepared = write_hf_folder(cfg, model, progress.iteration)
        beside = on_every_rank(
            lambda: side_files(cfg, scratch) if platform.is_rank_zero() else {}, "cannot describe the run"
        )
        return dist_checkpoint.start_save(
            cfg.checkpoint.save,
            progress.iteration,
            state,
            side_files=beside,
            content_metadata=dict(_SHARDING),
            background=background,
            prepared=prepared,
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
    path = resumed_path(cfg.checkpoint)
    if path is None:
        raise BridgeError("checkpoint.load is not set: there is nothing to load from")
    found = newest_whole(path, every_bit=True)
    return _progress(_load(found.folder, model, optimizer, scheduler, cfg))


def _progress(loaded: Mapping[str, Any]) -> TrainProgress:
    return TrainProgress(
        iteration=loaded["iteration"],
        consumed_samples=loaded["consumed_samples"],
        stream_states=loaded.get("stream_states", ()),
    )


def _load(folder: Path, model: list[Any], optimizer: Any, scheduler: Any, cfg: "ConfigContainer") -> Mapping[str, Any]:
    """Load one checkpoint folder into the parts; returns all that it held."""
    common = dist_checkpoint.load_common(folder)
    if "iteration" not in common:
        raise BridgeError(
            f"{folder} holds weights only, no training state; start from it with checkpoint.pretrained_checkpoint"
        )
    state = _trained_state(model, cfg)
    ignore: tuple[str, ...] = ()
    engine = engine_of(cfg)
    same_layout = common.get("parallel_layout") == engine.layout(cfg)
    if cfg.checkpoint.load_rng and same_layout:
        state["rng_state"] = random_state(engine, cfg)
    else:
        ignore += ("rng_state",)
    if optimizer is not None and cfg.checkpoint.load_optim:
        _refuse_other_optimizer(folder, common, cfg)
        state["optimizer"] = engine.optimizer_state(optimizer, state, _SHARDING, is_loading=True)
    else:
        ignore += ("optimizer.",)
    loaded = dist_checkpoint.load(folder, state, ignore=ignore)
    _fill_trained(model, loaded, cfg)
    if "optimizer" in state:
        # A rank of a module that is not trained has nothing there.
        engine.load_optimizer_state(optimizer, loaded.get("optimizer", {}), common.get("optimizer", {}))
    elif optimizer is not None:
        optimizer.reload_model_params()
    if scheduler is not None and cfg.checkpoint.load_optim:
        # `load_state_dict` steps forward from where the schedule stands.
        scheduler.num_steps = 0
        scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if "rng_state" in state:
        put_back(loaded["rng_state"])
    return common | {key: loaded[key] for key in ("iteration", "consumed_samples")}


def _refuse_other_optimizer(folder: Path, common: Mapping[str, Any], cfg: "ConfigContainer") -> None:
    saved = common.get("distributed_optimizer", cfg.ddp.use_distributed_optimizer)
    if saved != cfg.ddp.use_distributed_optimizer:
        raise BridgeError(
            f"{folder} holds the state of {'the' if saved else 'an optimizer that is not the'} distributed optimizer; "
            f"set ddp.use_distributed_optimizer={saved} and optimizer.use_distributed_optimizer={saved}, or "
            "checkpoint.load_optim=False to go on with fresh moments"
        )


def load_weights(model: list[Any], optimizer: Any, path: str | Path) -> None:
    """Load a checkpoint's weights alone, e.g. those that `AutoBridge.import_ckpt` converted. Collective."""
    loaded = dist_checkpoint.load(path, _model_state(model), ignore=BESIDES_WEIGHTS)
    fill(as_chunks(model), loaded)
    if optimizer is not None:
        optimizer.reload_model_params()


def starting_point(cfg: "ConfigContainer") -> Found | None:
    """The checkpoint that the run starts from, looked through to the last bit; None where there is none. Collective.

    Raises:
        BridgeError: `checkpoint.load` or `checkpoint.pretrained_checkpoint` names nothing that is whole.
    """
    resumed, pretrained = resumed_path(cfg.checkpoint), cfg.checkpoint.pretrained_checkpoint
    if resumed is not None:
        return newest_whole(resumed, every_bit=True)
    if pretrained is None or is_hf_folder(pretrained):
        return None
    return newest_whole(resolve(pretrained), every_bit=True)


def restore(run: "RunState", found: Found) -> None:
    """Put `run` where the checkpoint `found` left off.

    Raises:
        BridgeError: see `load_checkpoint`.
    """
    checkpoint = run.cfg.checkpoint
    assert checkpoint.load is not None
    loaded = _load(found.folder, run.model, run.optimizer, run.scheduler, run.cfg)
    run.progress = _progress(loaded)
    run.logger_states = dict(loaded.get("logger_states", {}))
    if loaded.get("guard_state"):
        run.guard.load_state_dict(loaded["guard_state"])
    run.notices += found.notices()
    if checkpoint.save is not None and Path(checkpoint.save).resolve() == Path(checkpoint.load).resolve():
        set_aside(found)


def _model_state(model: list[Any]) -> dict[str, Any]:
    return model_state(as_chunks(model), _SHARDING)


def _trained_state(model: list[Any], cfg: "ConfigContainer") -> dict[str, Any]:
    """What a run saves: the whole model, or what a PEFT method trains."""
    chunks = as_chunks(model)
    state = _model_state(model)
    return trained_part(state, chunks, state_keys(len(chunks))) if is_adapted(cfg) else state


def _fill_trained(model: list[Any], loaded: Mapping[str, Any], cfg: "ConfigContainer") -> None:
    chunks = as_chunks(model)
    if is_adapted(cfg):
        fill_trained_part(chunks, loaded, state_keys(len(chunks)))
    else:
        fill(chunks, loaded)
