"""A limit on what a piece of work may allocate, so that damaged input ends in an error and not in a killed machine."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def memory_limit(extra_bytes: int) -> Iterator[None]:
    """Within the block this process may allocate at most `extra_bytes` more; beyond that Python raises MemoryError.

    The limit is the process's (its other threads share it), on address space; an existing lower limit stays.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + extra_bytes
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
