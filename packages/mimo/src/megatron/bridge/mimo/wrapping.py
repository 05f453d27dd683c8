"""What surrounds each module for training: device, precision, Megatron-Core's DDP on the module's own groups."""

import copy
from typing import TYPE_CHECKING, Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron.bridge.conversion.live_weights import unwrap
from megatron.bridge.mimo.module_groups import LANGUAGE
from megatron.bridge.models.wrapping import prepared_chunks

if TYPE_CHECKING:
    from megatron.bridge.mimo.model import BridgeMimoModel


def prepared(model: "BridgeMimoModel") -> None:
    """Every module on this process's device; a language model in bf16 in Megatron-Core's `Float16Module`."""
    for name, module in model.parts().items():
        config: Any = copy.copy(module.config)
        # An encoder casts what goes in, and its module is built in its precision.
        config.bf16 = config.bf16 and name == LANGUAGE
        model.wrap({name: prepared_chunks([module], config)[0]})


def with_ddp(model: "BridgeMimoModel", settings: DistributedDataParallelConfig | None) -> None:
    """Every module in Megatron-Core's DDP, starting from the first replica's weights."""
    for name, module in model.parts().items():
        config: Any = unwrap(module).config
        own = copy.copy(settings or DistributedDataParallelConfig())  # DDP sets its bucket size on it
        wrapped = DistributedDataParallel(config, own, module, pg_collection=model.module_groups[name].here)
        wrapped.broadcast_params()
        model.wrap({name: wrapped})
