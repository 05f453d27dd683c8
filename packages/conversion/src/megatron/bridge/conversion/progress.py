"""Progress bars on rank 0, drawn only on a terminal."""

from collections.abc import Iterable, Iterator

from megatron.bridge import platform


def tracked[T](items: Iterable[T], total: int, label: str, *, shown: bool = True) -> Iterator[T]:
    """Yield `items`, drawing a bar with count, speed and time left when `shown` and this is rank 0."""
    if not (shown and platform.is_rank_zero()):
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield from bar.track(items, total=total, description=label)
