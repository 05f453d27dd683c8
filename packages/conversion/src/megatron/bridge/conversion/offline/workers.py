"""Threads that work through independent jobs; the first failure stops the others."""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from megatron.bridge.errors import BridgeError


def run_all[T](jobs: Iterable[T], work: Callable[[T], None], workers: int) -> None:
    """Call `work` on every job, `workers` at a time, and raise the first error.

    Threads suffice: nearly all time goes into copying and writing, during which Python runs the others.
    """
    if workers < 1:
        raise BridgeError(f"workers must be at least 1, not {workers}")
    pool = ThreadPoolExecutor(workers, thread_name_prefix="convert")
    try:
        running = [pool.submit(work, job) for job in jobs]
        for future in wait(running, return_when=FIRST_EXCEPTION).done:
            future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
