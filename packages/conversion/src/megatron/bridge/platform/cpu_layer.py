"""The CPU layer: lets the unmodified `megatron-core` wheel run on CPU and gloo.

Megatron-Core asks for `device="cuda"`, CUDA streams, CUDA random state and `torch.cuda.*Tensor` type names in places
that have a plain CPU meaning. `enable_cpu_layer()` gives them that meaning and `disable_cpu_layer()` takes it back;
nothing happens on import. `replaced()` lists every name it stands in for. It refuses to run where CUDA works.

Tested with Megatron-Core 0.19; what is replaced:

- allocation (`torch.empty(device="cuda")`, `Tensor.to("cuda")`, `Module.cuda()`, ...) lands on the CPU, and no memory
  is pinned for a GPU to read;
- streams, events and NVTX ranges do nothing: a CPU has one queue, in program order;
- CUDA random state is the default generator's;
- `Tensor.type()` answers `torch.cuda.FloatTensor`, since the optimizers select parameters by that string;
- process groups asked for with `nccl` use gloo, and all of a process's share its network device;
- `all_gather`, `reduce_scatter` and `all_to_all_single` take unequal parts as they do with NCCL.
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.platform import uneven_collectives
from megatron.bridge.platform.gloo_device import with_shared_devices

_DTYPES = ("Float", "Double", "Half", "BFloat16", "Int", "Long", "Short", "Byte", "Bool")
_NO_EFFECT = [
    "synchronize",
    "set_device",
    "empty_cache",
    "reset_peak_memory_stats",
    "reset_max_memory_allocated",
    "ipc_collect",
]
_ZERO = ["memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"]


class _Allocation:
    """Marks, among the replacements, the mode that redirects `device="cuda"` in every torch function."""

    __name__ = 'torch functions with device="cuda"'


_ALLOCATION = _Allocation()

# (owner, attribute, what stood there) for each replacement in force, in the order made.
_saved: list[tuple[Any, str, Any]] = []
_ABSENT = object()


def cpu_layer_enabled() -> bool:
    """Whether the layer is in force in this process."""
    return bool(_saved)


def replaced() -> tuple[str, ...]:
    """Qualified names the layer stands in for at this moment."""
    return tuple(f"{getattr(owner, '__name__', owner)}.{attribute}" for owner, attribute, _ in _saved)


def enable_cpu_layer() -> None:
    """Put the layer in force; a second call does nothing.

    Raises:
        BridgeError: CUDA works in this process, so the layer would hide a GPU.
    """
    import torch

    if _saved:
        return
    if torch.cuda.is_available():
        raise BridgeError(
            "the CPU layer is for machines without CUDA, and this process has a CUDA device; "
            "set CUDA_VISIBLE_DEVICES='' to run on the CPU"
        )
    _redirect_allocation()
    _redirect_cuda_module()
    _redirect_random_state()
    _redirect_process_groups()


def disable_cpu_layer() -> None:
    """Put back everything that `enable_cpu_layer` replaced."""
    while _saved:
        owner, attribute, original = _saved.pop()
        if owner is _ALLOCATION:
            original.__exit__(None, None, None)
        elif original is _ABSENT:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, original)


@contextlib.contextmanager
def cpu_layer() -> Iterator[None]:
    """The layer within a `with` block."""
    enable_cpu_layer()
    try:
        yield
    finally:
        disable_cpu_layer()


def _replace(owner: Any, attribute: str, value: Any) -> None:
    # vars() rather than getattr(): an inherited attribute must be deleted on the way back, not copied down.
    _saved.append((owner, attribute, vars(owner).get(attribute, _ABSENT)))
    setattr(owner, attribute, value)


def _on_cpu(where: Any) -> Any:
    """`where` with any CUDA device replaced by the CPU; other values pass."""
    import torch

    if isinstance(where, str) and where.startswith("cuda"):
        return "cpu"
    if isinstance(where, torch.device) and where.type == "cuda":
        return torch.device("cpu")
    return where


def _enter_cpu_mode() -> Any:
    """A torch function mode rather than wrappers: `with torch.device("meta")` and the like keep seeing torch's own."""
    import torch
    from torch.overrides import TorchFunctionMode

    class CudaMeansCpu(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if kwargs and "device" in kwargs:
                kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
            if kwargs and "pin_memory" in kwargs:
                kwargs = {**kwargs, "pin_memory": False}
            if function is torch.Tensor.to:
                args = tuple(map(_on_cpu, args))
            return function(*args, **(kwargs or {}))

    return CudaMeansCpu().__enter__()


def _redirect_allocation() -> None:
    import torch

    mode = _enter_cpu_mode()
    _saved.append((_ALLOCATION, "mode", mode))
    run_backward = torch.autograd._engine_run_backward

    @functools.wraps(run_backward)
    def run_backward_in_mode(*args: Any, **kwargs: Any) -> Any:
        # `Tensor.backward` leaves the mode, and recomputed activations run code in it.
        with mode:
            return run_backward(*args, **kwargs)

    _replace(torch.autograd, "_engine_run_backward", run_backward_in_mode)
    module_to = torch.nn.Module.to

    @functools.wraps(module_to)
    def to_cpu(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        return module_to(self, *map(_on_cpu, args), **{key: _on_cpu(value) for key, value in kwargs.items()})

    _replace(torch.nn.Module, "to", to_cpu)
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.Tensor, "pin_memory", lambda self, *args: self)
    _replace(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch, "autocast", _cpu_autocast_class())

    type_name = torch.Tensor.type

    @functools.wraps(type_name)
    def cuda_type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_name(self, *args, **kwargs)
        # Under the function mode torch calls this by name once more from inside, so the answer may be done already.
        if isinstance(answer, str) and not answer.startswith("torch.cuda."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    _replace(torch.Tensor, "type", cuda_type_name)


class _Queue:
    """A CUDA stream or event on a machine with one queue: everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = "cpu"

    def _nothing(self, *args: Any, **kwargs: Any) -> None: ...

    wait_stream = wait_event = record = wait = synchronize = _nothing

    def record_event(self, event: "_Queue | None" = None) -> "_Queue":
        return event or _Queue()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Queue") -> float:
        raise BridgeError("CUDA events do not measure time on a CPU; use time.perf_counter")

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


def _redirect_cuda_module() -> None:
    import torch
    import torch.cuda.nvtx

    cuda = torch.cuda
    cpu = torch.device("cpu")
    _replace(cuda, "current_device", lambda: cpu)
    _replace(cuda, "device", lambda *args: contextlib.nullcontext())
    for name in ("Stream", "Event"):
        _replace(cuda, name, _Queue)
    for name in ("current_stream", "default_stream"):
        _replace(cuda, name, lambda *args, **kwargs: _Queue())
    _replace(cuda, "stream", lambda stream: contextlib.nullcontext())
    _replace(cuda, "is_current_stream_capturing", lambda: False)
    for name in _NO_EFFECT:
        _replace(cuda, name, lambda *args, **kwargs: None)
    for name in _ZERO:
        _replace(cuda, name, lambda *args, **kwargs: 0)
    for name in ("range_push", "range_pop", "mark"):
        _replace(cuda.nvtx, name, lambda *args, **kwargs: None)
    for name in _DTYPES:
        _replace(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))


class _DefaultGenerators:
    """`torch.cuda.default_generators` when every device is the CPU."""

    def __getitem__(self, index: Any) -> Any:
        import torch

        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _redirect_random_state() -> None:
    import torch

    def get_state(*args: Any, **kwargs: Any) -> Any:
        return torch.get_rng_state()

    def set_state(state: Any, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    for owner in (torch.cuda, torch.cuda.random):
        _replace(owner, "get_rng_state", get_state)
        _replace(owner, "set_rng_state", set_state)
        # Not torch.manual_seed, which calls these two.
        _replace(owner, "manual_seed", torch.default_generator.manual_seed)
        _replace(owner, "manual_seed_all", torch.default_generator.manual_seed)
    _replace(torch.cuda, "default_generators", _DefaultGenerators())

    def call_now(function: Callable[[], object], **kwargs: Any) -> None:
        function()

    _replace(torch.cuda, "_lazy_call", call_now)
    # It remarks that the CPU's state changed inside a block for the GPU's: here they are one and the same.
    _replace(logging.getLogger("megatron.core.tensor_parallel.random"), "disabled", True)
    # This module binds the name when it is imported, which may be before or after now.
    megatron_random = sys.modules.get("megatron.core.tensor_parallel.random")
    if megatron_random is not None:
        _replace(megatron_random, "_lazy_call", call_now)


def _redirect_process_groups() -> None:
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    def with_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def redirected(*args: Any, **kwargs: Any) -> Any:
            if "nccl" in str(kwargs.get("backend")):
                kwargs.update(backend="gloo", pg_options=None)
            return function(*args, **kwargs)

        return redirected

    for name in ("new_group", "new_subgroups_by_enumeration"):
        original = getattr(dist, name)
        for owner in (dist, distributed_c10d):
            _replace(owner, name, with_gloo(original))

    barrier = dist.barrier

    @functools.wraps(barrier)
    def barrier_without_devices(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_ids", None)
        return barrier(*args, **kwargs)

    _replace(dist, "barrier", barrier_without_devices)
    for name in ("all_gather", "reduce_scatter", "all_to_all_single"):
        _replace(dist, name, getattr(uneven_collectives, name)(getattr(dist, name)))
    gloo = distributed_c10d.ProcessGroupGloo
    _replace(gloo, "__init__", with_shared_devices(gloo.__init__))


def _cpu_autocast_class() -> type:
    import torch

    class CpuAutocast(torch.autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(_on_cpu(device_type), *args, **kwargs)

    return CpuAutocast
