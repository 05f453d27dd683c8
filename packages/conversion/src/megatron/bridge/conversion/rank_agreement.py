"""Ranks that agree: what fails on one rank is raised on every rank, so that none waits for a peer that has left."""

from collections.abc import Callable
from typing import Any

from megatron.bridge.errors import BridgeError


def gather[T](value: T) -> list[T]:
    """Every rank's `value`, by rank. Collective over the world."""
    import torch.distributed

    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def on_every_rank[T](work: Callable[[], T], doing: str, error_type: type[BridgeError] = BridgeError) -> T:
    """Run `work` on this rank and return its result when it succeeded on all ranks. Collective over the world.

    Raises:
        BridgeError: (of `error_type`, on every rank) `work` failed somewhere; says `doing`, the reasons and the ranks.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    failure, cause, result = None, None, None
    try:
        result = work()
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is not an Exception
        failure, cause = reason(error), error
    by_rank = gather(failure)
    failed = [rank for rank, text in enumerate(by_rank) if text is not None]
    if not failed:
        return result  # type: ignore[return-value]  # nothing failed, so `work` returned it
    where = "" if len(failed) == len(by_rank) else f" (on rank {', '.join(map(str, failed[:8]))})"
    texts = sorted({text for text in by_rank if text is not None})
    raise error_type(f"{doing}{where}: {' | '.join(texts[:3])}") from cause


def on_rank_zero(work: Callable[[], object], doing: str, error_type: type[BridgeError] = BridgeError) -> None:
    """Run `work` on rank 0; a failure there is raised on every rank. Collective over the world."""
    import torch.distributed

    on_every_rank(work if torch.distributed.get_rank() == 0 else lambda: None, doing, error_type)


def reason(error: BaseException) -> str:
    """A failure in one line: the message of our own errors, type and message of the others."""
    from torch.distributed.checkpoint.api import CheckpointException

    if isinstance(error, BridgeError):
        return str(error)
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(inner).__name__}: {inner}"
    return f"{type(error).__name__}: {error}"
