"""Device, communication backend and capability report."""

import os
import resource
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@cache
def cuda_available() -> bool:
    """Whether this process can use a CUDA device. Asked once: finding out opens the driver's library each time."""
    import torch

    return torch.cuda.is_available()


def device() -> "torch.device":
    """This process's device: `cuda:LOCAL_RANK` where CUDA works, else `cpu`."""
    import torch

    if not cuda_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def backend() -> str:
    """torch.distributed backend for `device()`: `nccl` or `gloo`."""
    return "nccl" if cuda_available() else "gloo"


def synchronize() -> None:
    """Wait for queued device work; nothing to wait for on a CPU."""
    if cuda_available():
        import torch

        torch.cuda.synchronize()


def device_name() -> str | None:
    """What CUDA calls this process's device, e.g. `NVIDIA H100 80GB HBM3`; None on a CPU."""
    import torch

    return torch.cuda.get_device_name(device()) if cuda_available() else None


def peak_memory_bytes() -> int:
    """Highest memory so far: bytes allocated on the CUDA device, or the process's resident set on a CPU."""
    import torch

    if cuda_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe() -> dict[str, Any]:
    """Capability report: device, backend, CUDA devices (name, memory in bytes, compute capability) and driver."""
    import torch

    devices = []
    if cuda_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "name": properties.name,
                    "memory": properties.total_memory,
                    "capability": f"{properties.major}.{properties.minor}",
                }
            )
    return {
        "device": str(device()),
        "backend": backend(),
        "cpu_count": os.cpu_count(),
        "cuda_available": bool(devices),
        "cuda_runtime": torch.version.cuda,
        "cuda_devices": devices,
        "cuda_driver": _driver_version() if devices else None,
    }


def _driver_version() -> str | None:
    import torch

    version: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    return f"{version // 1000}.{version % 1000 // 10}"
