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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

from megatron.bridge.errors import BridgeError


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
    """How one rank ended: `value` when `error` is None; `error` is the exception where it could be pickled."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    # Ranks that only lost a peer fail after the one at fault; the monotonic clock is common to the machine.
    at: float = field(default_factory=time.monotonic)


def run_ranks(
    count: int, function: Callable[..., Any], *args: Any, timeout: float = 600.0, grace: float = 5.0
) -> list[Any]:
    """Run `function(*args)` in `count` forked ranks with torch.distributed initialised; return their results by rank.

    Args:
        count: number of ranks.
        function: called in every rank; closures are fine, results must pickle.
        timeout: seconds for the whole run. Collectives in the ranks fail after the same time.
        grace: seconds a rank has to end by itself after another one failed, before it is killed.

    Raises:
        RankFailed: chained to the first failed rank's exception.
    """
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
    context = multiprocessing.get_context("fork")
    ranks = []
    for index in range(count):
        receiver, sender = context.Pipe(duplex=False)
        place = environment | {"RANK": str(index), "LOCAL_RANK": str(index)}
        process = context.Process(
            target=_rank_main, args=(sender, place, function, args, timeout), name=f"rank {index}", daemon=False
        )
        process.start()
        sender.close()
        ranks.append(_Rank(index, process, receiver))
    try:
        _collect(ranks, time.monotonic() + timeout, grace)
    except KeyboardInterrupt:
        # The terminal has sent the same signal to the ranks: let them end as they wish before taking them down.
        _collect(ranks, time.monotonic() + 60, grace=60)
        raise
    finally:
        _kill([rank.process for rank in ranks])
    failed = [rank for rank in ranks if rank.report is None or rank.report.trace]
    if failed:
        raise _failure(failed, count, timeout)
    return [rank.report.value for rank in ranks if rank.report is not None]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(
    sender: Connection, place: dict[str, str], function: Callable[..., Any], args: Sequence[Any], timeout: float
) -> None:
    import torch

    os.environ.update(place)
    # The OpenMP runtime does not survive a fork with more than one thread, and ranks share the cores anyway.
    torch.set_num_threads(1)
    from megatron.bridge.platform.distributed import destroy_distributed, initialize_distributed

    try:
        initialize_distributed(timeout)
        report = _Report(value=function(*args))
        payload = pickle.dumps(report)
    except BaseException as error:
        payload = _pickled_failure(error)
        sender.send_bytes(payload)
        sender.close()
        # A peer may be waiting in a collective for this rank: end without the orderly farewell it cannot answer.
        os._exit(1)
    sender.send_bytes(payload)
    sender.close()
    destroy_distributed()


def _pickled_failure(error: BaseException) -> bytes:
    trace = "".join(traceback.format_exception(error))
    try:
        payload = pickle.dumps(_Report(error=error, trace=trace))
        pickle.loads(payload)
    except Exception:
        return pickle.dumps(_Report(trace=trace))
    return payload


def _collect(ranks: list[_Rank], deadline: float, grace: float) -> None:
    """Receive reports until all are in, the deadline passes, or `grace` seconds after a first failure."""
    waiting = {rank.results: rank for rank in ranks if rank.report is None}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for ready in wait(list(waiting), timeout=left):
            rank = waiting.pop(cast("Connection", ready))
            try:
                rank.report = pickle.loads(rank.results.recv_bytes())
            except EOFError:
                rank.process.join(1)
                rank.report = _Report(trace=f"the process died ({_exit_reason(rank.process.exitcode)})\n")
            if rank.report and rank.report.trace:
                deadline = min(deadline, time.monotonic() + grace)
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


def _failure(failed: list[_Rank], count: int, timeout: float) -> RankFailed:
    reports = [rank.report for rank in failed if rank.report is not None]
    lines = [f"{len(failed)} of {count} ranks failed"]
    for rank in failed:
        if rank.report is None:
            lines.append(
                f"[rank {rank.index}] did not finish (time-out of {timeout:.0f} s, or stopped after a peer failed)"
            )
        else:
            lines.append(f"[rank {rank.index}] {rank.report.trace.rstrip()}")
    failure = RankFailed("\n".join(lines))
    failure.__cause__ = min(reports, key=lambda report: report.at).error if reports else None
    return failure


def run_layout(count: int, function: Callable[..., Any], *args: Any, timeout: float = 7 * 24 * 3600.0) -> Any:
    """Run `function(*args)` on `count` ranks, however this process was started; return rank 0's result.

    Under torchrun or srun this process is one of the ranks. Otherwise one rank runs here, and more are forked from here.

    Raises:
        BridgeError: the launcher started another number of ranks than `count` can use.
        RankFailed: a forked rank failed.
    """
    from megatron.bridge.platform.distributed import initialize_distributed, launched, world_size

    if launched():
        if world_size() % count:
            raise BridgeError(f"{world_size()} ranks were started, and this needs a multiple of {count}")
    elif count > 1:
        return run_ranks(count, function, *args, timeout=timeout)[0]
    initialize_distributed()
    return function(*args)
