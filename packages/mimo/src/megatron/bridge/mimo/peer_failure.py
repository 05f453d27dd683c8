"""Which rank, of which module, is at fault when a step fails: told on every rank that is left.

Ranks introduce themselves in the store by which they met. One that fails says why there before it leaves. One that dies
says nothing: then those on its machine see that its process is gone.
"""

import json
import os
import socket
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.rank_agreement import reason
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.mimo.parallelism import MimoParallelismConfig

_numbers = count()


class ModuleFailed(BridgeError):
    """A rank failed in a step, or is gone, while others waited for its module."""


class Peers:
    """The ranks that run a model together. Made on every rank of the world.

    Args:
        placement: names the modules.
        patience: seconds to wait for a word from the rank that is at fault.
    """

    def __init__(self, placement: "MimoParallelismConfig", patience: float = 3.0) -> None:
        import torch.distributed as dist

        self._placement, self._patience = placement, patience
        self._rank, self._ranks = dist.get_rank(), range(dist.get_world_size())
        # Every rank makes its models in the same order.
        self._prefix = f"megatron-bridge/mimo/{next(_numbers)}"
        self._here = socket.gethostname()
        if len(self._ranks) > 1:
            self._store.set(f"{self._prefix}/{self._rank}", json.dumps([self._here, os.getpid()]))

    def failure(self, error: Exception) -> Exception:
        """The error to raise in the place of `error`, which ended a step on this rank."""
        if len(self._ranks) == 1:
            return error
        try:
            if not _of_an_exchange(error):
                self._tell(f"rank {self._rank}: {reason(error)}")
            return ModuleFailed(f"a step failed: {self._cause() or self._gone()} ({self._modules()})")
        except RuntimeError as lost:  # the store is rank 0's, or its launcher's
            return ModuleFailed(f"a step failed: rank 0 is gone ({self._modules()}); {reason(lost)}")

    @property
    def _store(self) -> Any:
        import torch.distributed as dist

        return dist.distributed_c10d._get_default_store()

    def _tell(self, cause: str) -> str:
        """Say what is at fault, unless it was said already; returns what was said first."""
        return str(self._store.compare_set(f"{self._prefix}/cause", "", cause).decode())

    def _cause(self) -> str | None:
        """What the rank at fault has said."""
        import torch.distributed as dist

        key = f"{self._prefix}/cause"
        try:
            self._store.wait([key], timedelta(seconds=self._patience))
        except (dist.DistError, RuntimeError):
            return None
        return str(self._store.get(key).decode())

    def _gone(self) -> str:
        """Ranks whose process is no more, as far as this machine can tell."""
        gone, elsewhere = [], []
        for rank in self._ranks:
            host, process = json.loads(self._store.get(f"{self._prefix}/{rank}"))
            if host != self._here:
                elsewhere.append(rank)
            elif not _lives(process):
                gone.append(rank)
        if gone:
            # Whoever reads this leaves next, and is not at fault.
            return self._tell(f"{_named(gone)} {'is' if len(gone) == 1 else 'are'} gone")
        left = f"; look at {_named(elsewhere)} on other machines" if elsewhere else ""
        return f"an exchange with a peer broke, and every rank of this machine is there{left}"

    def _modules(self) -> str:
        spans = (
            f"{name!r} stands on {_named(list(each.ranks))}"
            for name, each in self._placement.module_parallelisms.items()
        )
        return ", ".join(spans)


def _of_an_exchange(error: Exception) -> bool:
    """Whether an error is of torch.distributed: gloo's have no type of their own."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _lives(process: int) -> bool:
    """Whether a process of this machine runs; one that has ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def _named(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    whole = ranks == list(range(ranks[0], ranks[-1] + 1)) if ranks else False
    return f"ranks {ranks[0]}-{ranks[-1]}" if whole else f"ranks {', '.join(map(str, ranks))}"
