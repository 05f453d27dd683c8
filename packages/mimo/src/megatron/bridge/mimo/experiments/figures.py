"""From what the ranks measured to what a report says. Torch-free.

An exchange can begin when the last of its ranks has joined. Until then the others wait: that is the bubble. From then
on it is communication. Both are told apart when the run is over, from the times at which each rank joined.
"""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron.bridge.mimo.experiments.exchanges import Exchange, Interval, Key
from megatron.bridge.mimo.experiments.ranklog import BACKWARD, FORWARD, RankLog, Span

WAITING, EXCHANGE, OPTIMIZER = "waiting", "exchange", "optimizer"


@dataclass(frozen=True, kw_only=True)
class RankFigures:
    """One rank's watched steps, the faster half of them: what else runs on a machine disturbs the others. Per step.

    Attributes:
        modules: that stand on it.
        seconds: of a watched step; watching takes some of it.
        forward, backward: computing in each module, without the exchanges within.
        optimizer: in the update, without the exchanges within.
        waiting: for other ranks to join an exchange: the bubble.
        exchange: in exchanges that all had joined.
        exchange_bytes, exchanges: given in collectives, sent and received in messages; their number.
        memory_bytes: the most that was held.
    """

    modules: list[str]
    seconds: float
    forward: dict[str, float]
    backward: dict[str, float]
    optimizer: float
    waiting: float
    exchange: float
    exchange_bytes: float
    exchanges: float
    memory_bytes: int

    @property
    def bubble(self) -> float:
        """The share of a step in which the rank waits."""
        return self.waiting / self.seconds if self.seconds else 0.0

    @property
    def other(self) -> float:
        """What is left of a step: data, zeroing, the loop itself."""
        known = sum(self.forward.values()) + sum(self.backward.values()) + self.optimizer
        return max(0.0, self.seconds - known - self.waiting - self.exchange)


@dataclass(frozen=True)
class Bar:
    """Something on a rank's timeline: a pass of a module, `optimizer`, `waiting` or `exchange`; seconds of the step."""

    what: str
    module: str | None
    begin: float
    end: float


class RunFigures:
    """What a run came to.

    Args:
        logs: of all ranks, by rank.
    """

    def __init__(self, logs: Sequence[RankLog]) -> None:
        self._logs = logs
        self.samples, self.tokens = logs[0].samples, logs[0].tokens

    @cached_property
    def seconds(self) -> float:
        """Of a step that nothing disturbed: the median, on the slowest rank."""
        return max(statistics.median(log.seconds) for log in self._logs)

    @property
    def fastest_seconds(self) -> float:
        """Of the fastest such step, on the slowest rank: far from the median where others use the machine."""
        return max(min(log.seconds) for log in self._logs)

    @property
    def samples_per_second(self) -> float:
        """Over all ranks."""
        return self.samples / self.seconds

    @property
    def samples_per_second_and_rank(self) -> float:
        """What placements on unlike numbers of ranks are compared by."""
        return self.samples_per_second / len(self._logs)

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens / self.seconds

    @property
    def flops_per_second_and_rank(self) -> float | None:
        """Model FLOP/s of each rank; None where a module's operations are not known."""
        flops = self._logs[0].flops
        return None if flops is None else flops / self.seconds / len(self._logs)

    @property
    def mfu(self) -> float | None:
        """The share of what the device can do; None where either is not known."""
        done, peak = self.flops_per_second_and_rank, self._logs[0].peak_flops
        return None if done is None or peak is None else done / peak

    @property
    def memory_bytes(self) -> int:
        """The most that a rank held."""
        return max(log.memory_bytes for log in self._logs)

    @property
    def watched(self) -> bool:
        """Whether there is more to tell than times and memory."""
        return len(self._logs[0].watched) > 1

    @property
    def modules(self) -> list[str]:
        """All of them, in the order of the ranks."""
        return list(dict.fromkeys(name for log in self._logs for name in log.modules))

    def module_seconds(self, module: str) -> tuple[float, float]:
        """Forwards and backwards in a step, on the rank where both together take longest."""
        both = [(each.forward.get(module, 0.0), each.backward.get(module, 0.0)) for each in self.ranks]
        return max(both, key=sum)

    @property
    def bubble(self) -> float:
        """The mean over the ranks."""
        return statistics.mean(each.bubble for each in self.ranks)

    @property
    def exchange_share(self) -> float:
        """The mean share of a step in exchanges that all have joined."""
        return statistics.mean(each.exchange / each.seconds for each in self.ranks)

    @property
    def compute_share(self) -> float:
        """The mean share of a step in the modules and the optimizer."""
        return 1.0 - statistics.mean((each.waiting + each.exchange + each.other) / each.seconds for each in self.ranks)

    @cached_property
    def ranks(self) -> list[RankFigures]:
        """Of the watched steps; empty where none was watched."""
        return [self._rank(log) for log in self._logs] if self.watched else []

    def timelines(self) -> list[list[Bar]]:
        """Of each rank the watched step of median length. It begins when the first rank of its machine begins it."""
        lengths = _lengths(self._logs[0])
        step = max(self._chosen, key=lambda each: lengths[each])
        begins: dict[str, float] = {}
        for log in self._logs:
            begins[log.host] = min(log.watched[step], begins.get(log.host, log.watched[step]))
        return [[*self._bars(log, step, begins[log.host])] for log in self._logs]

    @cached_property
    def _joined(self) -> Mapping[Key, float]:
        """When the last rank joined each exchange. Clocks of several machines do not agree: none waits then."""
        joined: dict[Key, float] = {}
        if len({log.host for log in self._logs}) == 1:
            for log in self._logs:
                for each in log.exchanges:
                    if each.key is not None:
                        joined[each.key] = max(each.begun, joined.get(each.key, each.begun))
        return joined

    def _held(self, exchange: Exchange) -> Iterator[tuple[str, Interval]]:
        """What a rank did while an exchange held it up: it waited, then exchanged."""
        joined = self._joined.get(exchange.key, exchange.begun) if exchange.key is not None else exchange.begun
        for begin, end in exchange.held:
            there = min(max(begin, joined), end)
            if there > begin:
                yield WAITING, (begin, there)
            if end > there:
                yield EXCHANGE, (there, end)

    @cached_property
    def _chosen(self) -> list[int]:
        """The watched steps that are no longer than the median one, on the rank where they took longest."""
        lengths = [max(steps) for steps in zip(*(_lengths(log) for log in self._logs), strict=True)]
        return [step for step, length in enumerate(lengths) if length <= statistics.median_low(lengths)]

    def _rank(self, log: RankLog) -> RankFigures:
        steps = len(self._chosen)
        windows = [log.watched[step : step + 2] for step in self._chosen]
        spans = [each for each in log.spans if _within(each.begin, windows)]
        exchanges = [each for each in log.exchanges if _within(each.begun, windows)]
        held = [interval for each in exchanges for interval in each.held]
        computing: defaultdict[str, defaultdict[str | None, float]] = defaultdict(lambda: defaultdict(float))
        for span in spans:
            computing[span.what][span.module] += (span.end - span.begin - _overlap(span, held)) / steps
        spent: defaultdict[str, float] = defaultdict(float)
        for each in exchanges:
            for what, (begin, end) in self._held(each):
                spent[what] += (end - begin) / steps
        return RankFigures(
            modules=log.modules,
            seconds=sum(end - begin for begin, end in windows) / steps,
            forward={str(name): seconds for name, seconds in computing[FORWARD].items()},
            backward={str(name): seconds for name, seconds in computing[BACKWARD].items()},
            optimizer=computing[OPTIMIZER][None],
            waiting=spent[WAITING],
            exchange=spent[EXCHANGE],
            exchange_bytes=sum(each.nbytes for each in exchanges) / steps,
            exchanges=len(exchanges) / steps,
            memory_bytes=log.memory_bytes,
        )

    def _bars(self, log: RankLog, step: int, origin: float) -> Iterator[Bar]:
        start, stop = log.watched[step : step + 2]
        for span in log.spans:
            if span.what in (FORWARD, BACKWARD, OPTIMIZER) and start <= span.begin < stop:
                yield Bar(span.what, span.module, span.begin - origin, span.end - origin)
        for exchange in log.exchanges:
            for what, (begin, end) in self._held(exchange):
                if start <= begin < stop:
                    yield Bar(what, None, begin - origin, end - origin)


def _lengths(log: RankLog) -> list[float]:
    """Seconds of each watched step."""
    return [end - begin for begin, end in itertools.pairwise(log.watched)]


def _within(time: float, windows: Sequence[Sequence[float]]) -> bool:
    return any(begin <= time < end for begin, end in windows)


def _overlap(span: Span, intervals: Sequence[Interval]) -> float:
    """Seconds of a span that lie in one of the intervals, which do not overlap each other."""
    return sum(max(0.0, min(span.end, end) - max(span.begin, begin)) for begin, end in intervals)
