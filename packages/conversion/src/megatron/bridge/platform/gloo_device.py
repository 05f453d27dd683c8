"""One network device of gloo for all the process groups of a process.

PyTorch gives every gloo group a device of its own, and each device has a thread that wakes up a hundred times a second
whether or not there is traffic. Megatron-Core makes two dozen groups, most of them of one rank: together their threads
take some three per cent of a core, and stop a computation in the midst as often as they run. Gloo's devices are made to
serve several groups. Used by the CPU layer.
"""

import datetime
import functools
import os
from collections.abc import Callable
from typing import Any

_NO_TIMEOUT_GIVEN = datetime.timedelta(minutes=30)  # PyTorch's own


def with_shared_devices(torchs_own: Callable[..., None]) -> Callable[..., None]:
    """`ProcessGroupGloo.__init__` that joins this process's devices where it would make new ones."""

    @functools.wraps(torchs_own)
    def initialize(self: Any, store: Any, rank: int, size: int, *args: Any, **kwargs: Any) -> None:
        if "options" in kwargs or (args and not isinstance(args[0], datetime.timedelta)):
            torchs_own(self, store, rank, size, *args, **kwargs)
            return
        options = type(self)._Options()
        options._devices = _devices(os.getpid(), os.environ.get("GLOO_SOCKET_IFNAME", ""))
        options._threads = 2 * len(options._devices)
        options._timeout = args[0] if args else kwargs.get("timeout", _NO_TIMEOUT_GIVEN)
        torchs_own(self, store, rank, size, options)

    return initialize


@functools.cache
def _devices(process: int, interfaces: str) -> list[Any]:
    """Of this process, which threads do not survive a fork of; one for each network interface, or the host name's."""
    del process
    from torch.distributed.distributed_c10d import ProcessGroupGloo as Gloo

    names = [name for name in interfaces.split(",") if name]
    return [Gloo.create_device(interface=name) for name in names] or [Gloo.create_default_device()]
