"""Ranks that agree: what fails on one rank is raised on every rank, so that none waits for a peer that has left."""

from collections.abc import Callable, Iterable
from typing import Any

from megatron.bridge.errors import BridgeError


def gather[T](value: T) -> list[T]:
    """Every rank's `value`, by rank. Collective over the world."""
    import torch.distributed

    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def all_agree(opinion: bool) -> bool:
    """Whether every rank says yes. Collective over the world; cheap enough for every step."""
    import torch
    import torch.distributed as dist

    from megatron.bridge.platform import device

    agreed = torch.tensor(int(opinion), device=device())
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return bool(agreed)


def gather_within[T](groups: Iterable[Any], value: T) -> dict[int, T]:
    """The `value` of every rank that `groups` join to this one, by rank. Collective over each group in turn."""
    import torch.distributed as dist

    found = {dist.get_rank(): value}
    for group in groups:
        if group is not None and group.size() > 1:
            gathered: list[Any] = [None] * group.size()
            dist.all_gather_object(gathered, found, group=group)
            found = {rank: told for each in gathered for rank, told in each.items()}
    return found


def on_every_rank[T](
    work: Callable[[], T],
    doing: str,
    error_type: type[BridgeError] = BridgeError,
    groups: Iterable[Any] | None = None,
) -> T:
    """Run `work` on this rank and return its result when it succeeded on all ranks. Collective.

    Args:
        work: what to do.
        doing: begins the error's message.
        error_type: of the error.
        groups: process groups that join the ranks that must agree; None for the world.

    Raises:
        BridgeError: (of `error_type`, on every rank) `work` failed somewhere; says `doing`, the reasons and the ranks.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    failure, cause, result = None, None, None
    try:
        result = work()
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is not an Exception
        failure, cause = reason(error), error
    by_rank = dict(enumerate(gather(failure))) if groups is None else gather_within(groups, failure)
    failed = [rank for rank, text in sorted(by_rank.items()) if text is not None]
    if not failed:
        return result  # type: ignore[return-value]  # nothing failed, so `work` returned it
    where = "" if len(failed) == len(by_rank) else f" (on rank {', '.join(map(str, failed[:8]))})"
    texts = sorted({text for text in by_rank.values() if text is not None})
    raise error_type(f"{doing}{where}: {' | '.join(texts[:3])}") from cause


def on_rank_zero(
    work: Callable[[], object],
    doing: str,
    error_type: type[BridgeError] = BridgeError,
    groups: Iterable[Any] | None = None,
) -> None:
    """Run `work` on rank 0; a failure there is raised on every rank. Collective, as `on_every_rank` is."""
    import torch.distributed

    on_every_rank(work if torch.distributed.get_rank() == 0 else lambda: None, doing, error_type, groups)


def reason(error: BaseException) -> str:
    """A failure in one line: the message of our own errors, type and message of the others."""
    from torch.distributed.checkpoint.api import CheckpointException

    if isinstance(error, BridgeError):
        return str(error)
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(inner).__name__}: {inner}"
    return f"{type(error).__name__}: {error}"
