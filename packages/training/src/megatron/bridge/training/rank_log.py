"""A log file for each rank: what it says, the output of all but rank 0, and how it failed."""

import contextlib
import datetime
import faulthandler
import logging
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_LOGGER = "megatron.bridge"


@contextlib.contextmanager
def rank_log(folder: Path, headline: str) -> Iterator[None]:
    """Within the block this rank writes `folder/rank_XXXXX.log`, after what earlier starts left there.

    Into it go the messages of Python's logging, the traceback of what ends the block, and those of fatal signals. What
    other ranks than the first write to stdout and stderr, libraries in C included, goes there alone.
    """
    from megatron.bridge import platform

    rank = platform.rank()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank_{rank:05}.log").open("a", buffering=1, encoding="utf-8") as log:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        log.write(f"{now} start of rank {rank} on {socket.gethostname()}, process {os.getpid()}: {headline}\n")
        faulthandler.enable(log)
        try:
            with _logging_to(log), _output_to(log) if rank else contextlib.nullcontext():
                yield
        except BaseException:
            traceback.print_exc(file=log)
            raise
        finally:
            # Back to where Python's own handler writes, for the log is about to be closed.
            faulthandler.enable(sys.__stderr__ or 2)


@contextlib.contextmanager
def _logging_to(log: TextIO) -> Iterator[None]:
    handler = logging.StreamHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ours, root = logging.getLogger(_LOGGER), logging.getLogger()
    level = ours.level
    ours.setLevel(min(logging.INFO, ours.getEffectiveLevel()))
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        ours.setLevel(level)


@contextlib.contextmanager
def _output_to(log: TextIO) -> Iterator[None]:
    """Send the descriptors 1 and 2 into `log`."""
    streams = (sys.stdout, sys.stderr)
    kept = [os.dup(number) for number in (1, 2)]
    _flush(streams)
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    try:
        yield
    finally:
        _flush(streams)
        for number, earlier in zip((1, 2), kept, strict=True):
            os.dup2(earlier, number)
            os.close(earlier)


def _flush(streams: tuple[TextIO, ...]) -> None:
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
