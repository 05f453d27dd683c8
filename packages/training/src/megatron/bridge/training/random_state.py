"""The random state of a rank, as one sharded object of a checkpoint.

Each (pipeline, tensor) position has its own; data-parallel replicas share it, or have their own, too.
"""

import random
from typing import Any


def random_state(*, by_replica: bool) -> Any:
    """`state_of_this_rank`, to be saved or to be loaded into.

    Args:
        by_replica: data-parallel replicas have states of their own (`rng.data_parallel_random_init`).
    """
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    pipeline = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    tensor = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    replica = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    ranks, sizes = zip(pipeline, tensor, *([replica] if by_replica else []), strict=True)
    if by_replica:
        place = parallel_state.get_context_parallel_rank()
    else:
        place = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("rng_state", state_of_this_rank(), sizes, ranks, replica_id=place)


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
