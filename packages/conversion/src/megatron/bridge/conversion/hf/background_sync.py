"""Bringing written bytes to disk while the next ones are computed, so that finishing does not wait for all of them."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import RLock

# Often enough that little is left for the end, seldom enough that each call moves a long run of bytes.
_EVERY_BYTES = 128 * 2**20


class BackgroundSync:
    """One thread that syncs files, in order. What fails in it is raised by the next call of any method."""

    def __init__(self) -> None:
        # Its thread starts with the first task.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._tasks: deque[Future[None]] = deque()
        self._unsynced_bytes = 0
        self._lock = RLock()

    def wrote(self, nbytes: int, sync: Callable[[], None]) -> None:
        """Note `nbytes` more written; once enough came together, and nothing else runs, `sync()` is run."""
        with self._lock:
            self._unsynced_bytes += nbytes
            idle = not self._tasks or self._tasks[-1].done()
            if idle and self._unsynced_bytes >= _EVERY_BYTES:
                self._unsynced_bytes = 0
                self.submit(sync)

    def submit(self, task: Callable[[], None]) -> None:
        """Run `task()` after those submitted before."""
        with self._lock:
            while self._tasks and self._tasks[0].done():
                self._tasks.popleft().result()
            self._tasks.append(self._pool.submit(task))

    def finish(self) -> None:
        """Wait for all tasks."""
        self._pool.shutdown(wait=True)
        while self._tasks:
            self._tasks.popleft().result()

    def abort(self) -> None:
        """Wait for the running task only, and forget what failed."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._tasks.clear()
