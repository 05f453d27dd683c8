"""Megatron-Core's optimizer of each module, stepping as one: one gradient norm, one decision to update.

In a checkpoint each module's optimizer stands under its own name. Megatron-Core keeps what is not a tensor as rank 0
has it; here each module's goes as an object of its own, since rank 0 need not have the module.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedObject
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.models.mimo.optimizer import MimoOptimizer, ModuleOptimizerInfo
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides

from megatron.bridge.mimo.module_settings import ModuleOptimizerConfig, module_overrides
from megatron.bridge.training.fused_update import fuse_updates
from megatron.bridge.training.optimizer_state import load_optimizer_state, prepare_optimizer_state

if TYPE_CHECKING:
    from megatron.bridge.mimo.model import BridgeMimoModel

# How often Megatron-Core compares parameter groups over the whole world while it makes one optimizer: for dense weights
# and for experts.
_COMPARISONS = 2


def build_optimizer(
    model: "BridgeMimoModel",
    settings: OptimizerConfig,
    overrides: Mapping[str, Any],
    by_module: Mapping[str, ModuleOptimizerConfig] | None = None,
) -> MimoOptimizer:
    """The optimizer of the modules on this rank. Collective over the world.

    Args:
        model: its modules wrapped in Megatron-Core's DDP.
        settings: of all modules.
        overrides: Megatron-Core's `config_overrides` by module; the standard ones where there are none.
        by_module: what differs in some of them, the language model by Megatron-Core's key.
    """
    infos = {}
    encoders = model.encoders()
    for name, place in model.module_groups.items():
        part = model.parts().get(name)
        made, base = None, overrides.get(name)
        if base is None:
            base = get_standard_config_overrides(settings)
        if part is None:
            for _ in range(_COMPARISONS):  # ranks that have the module wait for every rank of the world
                dist.all_gather_object([None] * dist.get_world_size(), [])
        else:
            made = get_megatron_optimizer(
                settings,
                [part],
                config_overrides=base | module_overrides(name, by_module or {}, encoders.get(name)),
                use_gloo_process_groups=False,
                pg_collection=place.here,
            )
            fuse_updates(made)
        infos[name] = ModuleOptimizerInfo(made, place.grid, place.groups, part is not None)
    return MimoOptimizer(infos, settings)


def stepping(optimizer: MimoOptimizer) -> dict[str, ModuleOptimizerInfo]:
    """The modules of which this rank trains something."""
    return {
        name: info
        for name, info in optimizer.module_infos.items()
        if info.optimizer is not None and not info.optimizer.is_stub_optimizer
    }


def module_state(
    name: str, info: ModuleOptimizerInfo, model_state: dict[str, Any], sharding: Mapping[str, Any], *, is_loading: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One module's part of a checkpoint, and the values in it that are no tensors, as they are now.

    Args:
        name: of the module.
        info: with its optimizer.
        model_state: the model's part of the checkpoint.
        sharding: how Megatron-Core names and splits it.
        is_loading: it will be loaded into.
    """
    prepare_optimizer_state(info.optimizer)
    state = info.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=dict(sharding))
    tensors, present = extract_matching_values(state, _kept_apart)
    add_prefix_for_sharding(tensors, f"optimizer.{name}.")
    groups = info.pg_collection
    copy = (groups.pp.rank(), groups.tp.rank(), groups.dp_cp.rank())
    rest = ShardedObject(f"optimizer.{name}.rest", present, (1,), (0,), replica_id=copy)
    return {"tensors": tensors, "rest": rest}, present


def _kept_apart(value: Any) -> bool:
    """Whether Megatron-Core saves a value as each rank has it, or leaves it to the rank that loads."""
    return isinstance(value, ShardedBase | LocalNonpersistentObject)


def load_module_state(optimizer: Any, loaded: Mapping[str, Any], present: dict[str, Any]) -> None:
    """Load what was loaded for `module_state` into a module's optimizer, with its present settings."""
    load_optimizer_state(optimizer, merge(present, loaded["tensors"]), loaded["rest"])
