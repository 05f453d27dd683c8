"""Starts the ranks of a small run on this machine, by forking a process that has already imported what they need.

Importing Megatron-Core costs seconds; ranks forked from a warm parent start in milliseconds. The parent must not have
initialised CUDA. For several nodes use torchrun or srun: the same code runs under them.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, cast

from megatron.bridge.errors import BridgeError

# What a forked rank puts back, having inherited this process's handlers.
_handlers_of_ranks: dict[int, Any] = {}
_LONGEST_WAIT = 600.0  # seconds that a collective waits for an absent rank
_ATTEMPTS = 3  # to meet at a port, when another process takes it first


class RankFailed(BridgeError):
    """A rank raised, died or did not finish in time; the message holds every failed rank's report."""


@dataclass
class _Rank:
    index: int
    process: BaseProcess
    results: Connection
    report: "_Report | None" = None


@dataclass(frozen=True)
class _Report:
    """How one rank ended: `value` when `error` is None; `error` is the exception where it could be pickled.

    `port_taken`: another process had taken the port where the ranks were to meet, and `function` was not called.
    """

    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    port_taken: bool = False
    # Ranks that only lost a peer fail after the one at fault; the monotonic clock is common to the machine.
    at: float = field(default_factory=time.monotonic)


def run_ranks(
    count: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float | None = 600.0,
    grace: float = 5.0,
    collective_timeout: float | None = None,
    threads: int = 1,
) -> list[Any]:
    """Run `function(*args)` in `count` forked ranks with torch.distributed initialised; return their results by rank.

    Args:
        count: number of ranks.
        function: called in every rank; closures are fine, results must pickle.
        timeout: seconds for the whole run; None for no limit.
        grace: seconds a rank has to end by itself after another one failed, before it is killed.
        collective_timeout: seconds that a collective waits for an absent rank; None for `timeout`, at most 10 minutes.
        threads: of torch in each rank. More than one only where this process has not used several itself: the OpenMP
            runtime does not survive being forked.

    Raises:
        RankFailed: chained to the first failed rank's exception.
        KeyboardInterrupt: a rank was interrupted.
        BridgeError: this process belongs to a world of its own.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        raise BridgeError(
            "this process is a rank already, and ranks forked from it would take themselves for it; "
            "call megatron.bridge.platform.destroy_distributed() first"
        )
    waits = collective_timeout or min(timeout or _LONGEST_WAIT, _LONGEST_WAIT)
    for _ in range(_ATTEMPTS):
        ranks = _started(count, function, args, waits, threads)
        _await(ranks, timeout, grace)
        failed = [rank for rank in ranks if rank.report is None or rank.report.trace]
        if not any(rank.report is not None and rank.report.port_taken for rank in failed):
            break
    if any(rank.report is not None and isinstance(rank.report.error, KeyboardInterrupt) for rank in failed):
        raise KeyboardInterrupt
    if failed:
        raise _failure(failed, count, timeout)
    return [rank.report.value for rank in ranks if rank.report is not None]


def _started(
    count: int, function: Callable[..., Any], args: Sequence[Any], collective_timeout: float, threads: int
) -> list[_Rank]:
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
    context = multiprocessing.get_context("fork")
    ranks = []
    for index in range(count):
        receiver, sender = context.Pipe(duplex=False)
        place = environment | {"RANK": str(index), "LOCAL_RANK": str(index)}
        process = context.Process(
            target=_rank_main, args=(sender, place, function, args, collective_timeout, threads), name=f"rank {index}"
        )
        process.start()
        sender.close()
        ranks.append(_Rank(index, process, receiver))
    return ranks


def _await(ranks: list[_Rank], timeout: float | None, grace: float) -> None:
    """Receive what the ranks report, and see that none is left."""
    try:
        _collect(ranks, None if timeout is None else time.monotonic() + timeout, grace)
    except KeyboardInterrupt:
        # The terminal has sent the same signal to the ranks: let them end as they wish before taking them down.
        _collect(ranks, time.monotonic() + 60, grace=60)
        raise
    finally:
        _kill([rank.process for rank in ranks])


def _free_port() -> int:
    """A port that nobody listens on now; another process may take it before the ranks do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(
    sender: Connection,
    place: dict[str, str],
    function: Callable[..., Any],
    args: Sequence[Any],
    collective_timeout: float,
    threads: int,
) -> None:
    import torch

    os.environ.update(place)
    for number, handler in _handlers_of_ranks.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    from megatron.bridge.platform.distributed import destroy_distributed, initialize_distributed

    met = False
    try:
        initialize_distributed(collective_timeout)
        met = True
        report = _Report(value=function(*args))
        payload = pickle.dumps(report)
    except BaseException as error:
        payload = _pickled_failure(error, port_taken=not met and "EADDRINUSE" in str(error))
        sender.send_bytes(payload)
        sender.close()
        # A peer may be waiting in a collective for this rank: end without the orderly farewell it cannot answer.
        os._exit(1)
    sender.send_bytes(payload)
    sender.close()
    destroy_distributed()


def _pickled_failure(error: BaseException, *, port_taken: bool) -> bytes:
    trace = "".join(traceback.format_exception(error))
    try:
        payload = pickle.dumps(_Report(error=error, trace=trace, port_taken=port_taken))
        pickle.loads(payload)
    except Exception:
        return pickle.dumps(_Report(trace=trace, port_taken=port_taken))
    return payload


def _collect(ranks: list[_Rank], deadline: float | None, grace: float) -> None:
    """Receive reports until all are in, the deadline passes, or `grace` seconds after a first failure."""
    waiting = {rank.results: rank for rank in ranks if rank.report is None}
    while waiting:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            break
        for ready in wait(list(waiting), timeout=left):
            rank = waiting.pop(cast("Connection", ready))
            try:
                rank.report = pickle.loads(rank.results.recv_bytes())
            except EOFError:
                rank.process.join(1)
                rank.report = _Report(trace=f"the process died ({_exit_reason(rank.process.exitcode)})\n")
            if rank.report and rank.report.trace:
                deadline = min(deadline or float("inf"), time.monotonic() + grace)
    for rank in ranks:
        if rank.report is not None:
            rank.process.join(max(1.0, grace))


def _exit_reason(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join(5)


def _failure(failed: list[_Rank], count: int, timeout: float | None) -> RankFailed:
    """One error for all failed ranks. A refusal is told without tracebacks, and without the peers it took down."""
    refusals = [rank for rank in failed if rank.report is not None and isinstance(rank.report.error, BridgeError)]
    by_text: dict[str, list[int]] = {}
    for rank in refusals or failed:
        by_text.setdefault(_account(rank, timeout), []).append(rank.index)
    lines = [f"[rank {', '.join(map(str, indices))}] {text}" for text, indices in by_text.items()]
    if not refusals:
        lines.insert(0, f"{len(failed)} of {count} ranks failed")
    failure = RankFailed("\n".join(lines))
    reports = [rank.report for rank in refusals or failed if rank.report is not None]
    failure.__cause__ = min(reports, key=lambda report: report.at).error if reports else None
    return failure


def _account(rank: _Rank, timeout: float | None) -> str:
    if rank.report is None:
        limit = "" if timeout is None else f"time-out of {timeout:.0f} s, or "
        return f"did not finish ({limit}stopped after a peer failed)"
    if isinstance(rank.report.error, BridgeError):
        return str(rank.report.error)
    return rank.report.trace.rstrip()


@contextlib.contextmanager
def signals_left_to_ranks() -> Iterator[None]:
    """Within the block Ctrl-C and SIGTERM are for the ranks, which end as they see fit; this process waits for them.

    A terminal sends Ctrl-C to the ranks by itself; SIGTERM is passed on. The ranks start with the handlers that stood
    before.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            child.terminate()

    earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _handlers_of_ranks.update({int(number): handler for number, handler in earlier.items()})
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        _handlers_of_ranks.clear()
        for number, handler in earlier.items():
            signal.signal(number, handler)


def share_of_cores(count: int) -> int:
    """Threads for each of `count` ranks of this machine; OMP_NUM_THREADS has the last word."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    return int(stated) if stated.isdigit() else max(1, len(os.sched_getaffinity(0)) // count)


def run_layout(count: int, function: Callable[..., Any], *args: Any) -> Any:
    """Run `function(*args)` on `count` ranks, however this process was started; return rank 0's result.

    Under torchrun or srun this process is one of the ranks. Otherwise a single rank runs here, and several are forked.

    Raises:
        BridgeError: the launcher started another number of ranks than `count` can use.
        RankFailed: a forked rank failed.
    """
    from megatron.bridge.platform.distributed import initialize_distributed, launched, world_size

    if launched():
        if world_size() % count:
            raise BridgeError(f"{world_size()} ranks were started, and this needs a multiple of {count}")
    elif count > 1:
        return run_ranks(count, function, *args, timeout=None, threads=share_of_cores(count))[0]
    initialize_distributed()
    return function(*args)
