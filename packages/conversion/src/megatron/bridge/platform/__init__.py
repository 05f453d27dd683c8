"""What machine this is: the only package that may ask torch about CUDA.

`device`, `backend` and `describe` answer; `initialize_distributed` prepares one process, torchrun or srun; the CPU
layer (`enable_cpu_layer`) lets the unmodified Megatron-Core wheel run on CPU and gloo; `launch` starts ranks here.
"""

from megatron.bridge.platform.allocation import keep_freed_memory
from megatron.bridge.platform.cpu_layer import cpu_layer_enabled, disable_cpu_layer, enable_cpu_layer
from megatron.bridge.platform.device import (
    backend,
    cuda_available,
    describe,
    device,
    device_name,
    peak_memory_bytes,
    synchronize,
)
from megatron.bridge.platform.distributed import (
    barrier,
    destroy_distributed,
    destroy_model_parallel,
    initialize_distributed,
    is_rank_zero,
    local_rank,
    rank,
    world_size,
)

__all__ = [
    "backend",
    "barrier",
    "cpu_layer_enabled",
    "cuda_available",
    "describe",
    "destroy_distributed",
    "destroy_model_parallel",
    "device",
    "device_name",
    "disable_cpu_layer",
    "enable_cpu_layer",
    "initialize_distributed",
    "is_rank_zero",
    "keep_freed_memory",
    "local_rank",
    "peak_memory_bytes",
    "rank",
    "synchronize",
    "world_size",
]
