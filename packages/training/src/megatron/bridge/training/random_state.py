"""The random state of a rank, as one sharded object of a checkpoint.

Which ranks share one is the engine's business; see `Engine.random_place`.
"""

import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.engine import Engine


def random_state(engine: "Engine", cfg: "ConfigContainer") -> Any:
    """`state_of_this_rank`, to be saved or to be loaded into."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    sizes, place, copy = engine.random_place(cfg)
    return ShardedObject("rng_state", state_of_this_rank(), sizes, place, replica_id=copy)


def state_of_this_rank() -> dict[str, Any]:
    """State of Python, NumPy, torch, the device and Megatron's tracker."""
    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    return {
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": _device_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def put_back(state: dict[str, Any]) -> None:
    """Put back what `state_of_this_rank` gave."""
    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    random.setstate(state["random"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    _set_device_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def _device_state() -> Any:
    from torch.accelerator import is_available

    if not is_available():
        return None
    import torch

    from megatron.bridge.platform import device

    return torch.get_device_module(device()).get_rng_state()


def _set_device_state(state: Any) -> None:
    if state is None:
        return
    import torch

    from megatron.bridge.platform import device

    torch.get_device_module(device()).set_rng_state(state)
