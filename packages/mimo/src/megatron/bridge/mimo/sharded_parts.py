"""The checkpoint state of a module of which parts are Megatron-Core's."""

from typing import Any

from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import nn


def sharded_state(module: nn.Module, prefix: str, offsets: Any, metadata: dict[str, Any], group: Any) -> dict[str, Any]:
    """Sharded tensors by key: Megatron-Core's parts as these say, the rest whole on every tensor-parallel rank.

    Args:
        module: wherever Megatron-Core's modules are in it.
        prefix: of the keys.
        offsets: as Megatron-Core's `sharded_state_dict` takes them.
        metadata: as it takes it, with `dp_cp_group`.
        group: the tensor-parallel one.
    """
    parts = [part for part in module.modules() if hasattr(part, "sharded_state_dict")]
    if not parts or module in parts:
        return sharded_state_dict_default(module, prefix, offsets, metadata, tp_group=group)
    own: dict[str, Any] = {}
    module._save_to_state_dict(own, "", keep_vars=True)
    replicas = metadata["dp_cp_group"]
    state = make_sharded_tensors_for_checkpoint(
        own, prefix, sharded_offsets=offsets, tp_group=group, dp_cp_group=replicas
    )
    for name, child in module.named_children():
        state |= sharded_state(child, f"{prefix}{name}.", offsets, metadata, group)
    return dict(state)
