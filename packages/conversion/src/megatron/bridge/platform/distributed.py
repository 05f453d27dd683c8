"""torch.distributed for one process, torchrun and srun, with the CPU layer where there is no CUDA."""

import atexit
import contextlib
import datetime
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from typing import Any

from megatron.bridge.errors import BridgeError

# How each launcher tells a process its place: (rank, world size, local rank).
_LAUNCHERS: Mapping[str, tuple[str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}


def rank() -> int:
    """Global rank of this process; 0 when it is alone."""
    return _place()[0]


def world_size() -> int:
    """Number of processes; 1 when this one is alone."""
    return _place()[1]


def local_rank() -> int:
    """Rank among the processes of this node."""
    return _place()[2]


def is_rank_zero() -> bool:
    """Whether this process speaks for all: prints, writes shared files."""
    return rank() == 0


def _place() -> tuple[int, int, int]:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0))
    return _environment_place() or (0, 1, 0)


def _environment_place() -> tuple[int, int, int] | None:
    for names in _LAUNCHERS.values():
        # Inside an `salloc` shell SLURM_NTASKS is set without SLURM_PROCID belonging to a step.
        if names[0] in os.environ and names[1] in os.environ and not (names[0] == "SLURM_PROCID" and not _in_step()):
            return tuple(int(os.environ.get(name, 0)) for name in names)  # type: ignore[return-value]
    return None


def launched() -> bool:
    """Whether torchrun or srun started this process as one of several."""
    return _environment_place() is not None


def _in_step() -> bool:
    return "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_STEP_NODELIST") is not None


def initialize_distributed(timeout_seconds: float = 600.0, wanted: str | None = None) -> None:
    """Initialise torch.distributed once, choosing the device, the backend and the rendezvous.

    Under torchrun or srun the launcher's environment is used; a process started plainly becomes a world of one. Without
    CUDA the CPU layer is switched on first, so that Megatron-Core runs unchanged.

    Args:
        timeout_seconds: how long a collective waits for an absent rank before it fails.
        wanted: the backend; None for the one that suits the device.

    Raises:
        BridgeError: the launcher's environment is incomplete.
    """
    import torch
    import torch.distributed as dist

    from megatron.bridge.platform.cpu_layer import enable_cpu_layer
    from megatron.bridge.platform.device import backend, cuda_available, device

    if not cuda_available():
        enable_cpu_layer()
    if dist.is_initialized():
        return
    timeout = datetime.timedelta(seconds=timeout_seconds)
    place = _environment_place()
    if place is None:
        _initialize_alone(timeout, wanted)
        return
    rank, world, local = place
    os.environ.setdefault("LOCAL_RANK", str(local))
    if world > 1 and "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_slurm_node()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", _slurm_port())
    if cuda_available():
        torch.cuda.set_device(device())
    dist.init_process_group(wanted or backend(), rank=rank, world_size=world, timeout=timeout)


def _initialize_alone(timeout: datetime.timedelta, wanted: str | None) -> None:
    import torch.distributed as dist

    from megatron.bridge.platform.device import backend

    # A file rather than a port: no other process can take it first.
    folder = tempfile.mkdtemp(prefix="megatron-bridge-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    store = dist.FileStore(f"{folder}/store", 1)
    dist.init_process_group(wanted or backend(), store=store, rank=0, world_size=1, timeout=timeout)


def _first_slurm_node() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if nodes is None:
        raise BridgeError(
            "WORLD_SIZE is greater than 1 but MASTER_ADDR is not set, so the processes cannot meet; "
            "start them with torchrun or srun, or set MASTER_ADDR and MASTER_PORT"
        )
    head = nodes.split(",")[0]
    if "[" in nodes.split("]")[0]:
        prefix, _, numbers = nodes.partition("[")
        head = prefix + numbers.split("]")[0].split(",")[0].split("-")[0]
    return socket.gethostbyname(head)


def _slurm_port() -> str:
    # One port per job, the same on every node; jobs that share a node get different ones.
    return str(20000 + int(os.environ.get("SLURM_JOB_ID", 9500)) % 20000)


def barrier() -> None:
    """Wait for every rank; returns at once when this process is alone or not initialised."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def destroy_model_parallel() -> None:
    """Take down Megatron's groups with the threads and sockets behind them, so that other groups can be built.

    Megatron-Core forgets its groups only, and each of gloo's keeps threads and sockets.
    """
    import sys

    import torch.distributed as dist

    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is None or not parallel_state.is_initialized():
        return
    # None stands for the world's own group.
    groups = [group for group in parallel_state._global_process_group_list or () if group is not None]
    parallel_state.destroy_model_parallel()
    for group in groups:
        with contextlib.suppress(ValueError):  # Megatron-Core has taken it down itself
            dist.destroy_process_group(group)
    _forget_dead_groups(parallel_state)


def _forget_dead_groups(parallel_state: Any) -> None:
    """Megatron-Core remembers some of its groups; a dead one would be joined when a forked rank replaces it."""
    import torch.distributed as dist

    for name, value in vars(parallel_state).items():
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)


def destroy_distributed() -> None:
    """Take down Megatron's groups and torch.distributed, so that another world can be built in this process."""
    import sys

    import torch.distributed as dist

    destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    if parallel_state := sys.modules.get("megatron.core.parallel_state"):
        _forget_dead_groups(parallel_state)
