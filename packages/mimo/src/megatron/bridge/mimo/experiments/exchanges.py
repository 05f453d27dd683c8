"""What a rank exchanges with others, as it happens: with whom, how much, and how long it was held up.

Whoever calls torch.distributed, and by whatever name was bound at import, ends in the methods of one class. They are
wrapped while a log is open. Nothing is waited for that the caller does not wait for: gloo takes a second wait for a
message as a wait for a second message.
"""

import contextlib
import functools
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

# Methods of `ProcessGroup`, of torch 2.11 and later -> which argument holds what this rank gives.
_COLLECTIVES = {
    **dict.fromkeys(("allreduce", "allreduce_coalesced", "broadcast", "reduce"), 0),
    **dict.fromkeys(("allgather", "allgather_coalesced", "all_gather_single", "_allgather_base"), 1),
    **dict.fromkeys(("all_gather_single_coalesced", "allgather_into_tensor_coalesced"), 1),
    **dict.fromkeys(("reduce_scatter", "reduce_scatter_single", "_reduce_scatter_base"), 1),
    **dict.fromkeys(("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"), 1),
    **dict.fromkeys(("all_to_all_single", "alltoall_base", "alltoall", "gather", "scatter"), 1),
    "barrier": 0,
}
_MESSAGES = ("send", "recv", "recv_anysource")

type Key = tuple[Any, ...]
type Interval = tuple[float, float]


@dataclass
class Exchange:
    """One exchange, as one of its ranks saw it. Times are `time.perf_counter`'s.

    Attributes:
        kind: the method of `ProcessGroup`.
        key: the same on every rank that took part; None where the peer is not known.
        nbytes: that this rank gave, or received in a message.
        begun: when this rank joined.
        held: when this rank did nothing else.
    """

    kind: str
    key: Key | None
    nbytes: int
    begun: float
    held: list[Interval] = field(default_factory=list)


class ExchangeLog:
    """Writes down this process's exchanges while it is open. Groups of one rank exchange nothing."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self._numbers: Counter[Key] = Counter()
        self._waited_for: weakref.WeakKeyDictionary[Any, Exchange] = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Within the block exchanges are written down. On every rank it must begin and end between the same ones."""
        from torch.distributed import ProcessGroup, Work

        with contextlib.ExitStack() as stack:
            for name in (*_COLLECTIVES, *_MESSAGES):
                if hasattr(ProcessGroup, name):
                    stack.enter_context(_replaced(ProcessGroup, name, functools.partial(self._called, name)))
            stack.enter_context(_replaced(Work, "wait", self._waited))
            yield

    def _called(self, name: str, original: Callable[..., Any], group: Any, *args: Any, **kwargs: Any) -> Any:
        if group.size() == 1:
            return original(group, *args, **kwargs)
        begun = time.perf_counter()
        work = original(group, *args, **kwargs)
        exchange = Exchange(name, self._key(name, group, args), _nbytes(name, args), begun)
        exchange.held.append((begun, time.perf_counter()))
        self.exchanges.append(exchange)
        if work is not None:
            self._waited_for[work] = exchange
        return work

    def _waited(self, original: Callable[..., Any], work: Any, *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return original(work, *args, **kwargs)
        finally:
            exchange = self._waited_for.get(work)
            if exchange is not None:
                exchange.held.append((begun, time.perf_counter()))

    def _key(self, name: str, group: Any, args: Sequence[Any]) -> Key | None:
        """Ranks call a group's collectives in one order, and so do sender and receiver with their messages."""
        if name == "recv_anysource":
            return None
        key: Key = (str(group.group_name),)
        if name in _MESSAGES:
            _, peer, tag = args
            ends = (group.rank(), peer) if name == "send" else (peer, group.rank())
            key = (*key, *ends, tag)
        self._numbers[key] += 1
        return (*key, self._numbers[key])


@contextlib.contextmanager
def _replaced(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    # In the class lies what binds the object; taken from the class, it has lost that.
    kept, original = vars(owner)[name], getattr(owner, name)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def _nbytes(name: str, args: Sequence[Any]) -> int:
    place = _COLLECTIVES.get(name, 0)
    return sum(each.nbytes for each in _tensors(args[place])) if place < len(args) else 0


def _tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif hasattr(value, "nbytes"):
        yield value
