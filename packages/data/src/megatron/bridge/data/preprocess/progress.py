"""How far preprocessing has come, and a bar that shows it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Progress(NamedTuple):
    """Bytes of source files read and in all, and what has been written for them."""

    done_bytes: int
    total_bytes: int
    documents: int
    tokens: int


@contextmanager
def progress_bar(description: str = "preprocess") -> Iterator[Callable[[Progress], None]]:
    """A bar on stderr: bytes done, tokens per second, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=None, rate="")

        def show(progress: Progress) -> None:
            elapsed = bar.tasks[0].elapsed or 0.0
            rate = f"{progress.tokens / elapsed:,.0f} tokens/s" if elapsed > 0 else ""
            bar.update(task, total=progress.total_bytes, completed=progress.done_bytes, rate=rate)

        yield show
