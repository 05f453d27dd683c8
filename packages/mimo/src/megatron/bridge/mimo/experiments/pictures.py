"""The report's pictures: who is how fast and where the ranks' time goes; one step of every rank."""

from collections.abc import Sequence
from typing import Any

from megatron.bridge.mimo.experiments.figures import EXCHANGE, OPTIMIZER, WAITING, Bar, RunFigures
from megatron.bridge.mimo.experiments.ranklog import BACKWARD, FORWARD
from megatron.bridge.mimo.experiments.running import Outcome

# In inches: a rank's line, and what is around all of them.
_LINE, _AROUND, _WIDTH = 0.32, 1.1, 10.0
_FINEST = 500  # parts of a timeline that can be told apart
_GREY = {WAITING: "#eeeeee", EXCHANGE: "#9a9a9a", OPTIMIZER: "#555555", "other": "#ffffff"}
# Of each module: forwards, backwards.
_PAIRS = (("#8fb8de", "#2f6fae"), ("#f2b48a", "#c8601f"), ("#a9d3a0", "#3f8a37"), ("#cfb3dd", "#7d4a99"))

type _Rows = list[tuple[str, RunFigures, int]]


def draw(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """matplotlib figures by name, of the runs that went well: `throughput`, and `timeline` of watched steps."""
    runs = [(each.experiment.name, each.figures) for each in outcomes if each.figures is not None]
    watched = [(name, found) for name, found in runs if found.watched]
    pictures = {"throughput": _throughput(runs, watched)}
    return pictures | ({"timeline": _timeline(watched)} if watched else {})


def _throughput(runs: Sequence[tuple[str, RunFigures]], watched: Sequence[tuple[str, RunFigures]]) -> Any:
    rows = _rows(watched)
    figure = _figure(max(len(rows), len(runs)))
    speed, spent = figure.subplots(1, 2, width_ratios=[2, 3]) if rows else (figure.subplots(), None)
    bars = speed.barh([name for name, _ in runs], [found.samples_per_second for _, found in runs], color="#5b7fa6")
    speed.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=8)
    speed.set(title="samples per second", xlim=(0, 1.18 * max(found.samples_per_second for _, found in runs)))
    _quiet(speed)
    if spent is not None:
        _spent(spent, rows)
    return figure


def _spent(axis: Any, rows: _Rows) -> None:
    """Shares of each rank's step."""
    places = range(len(rows))
    ends = [0.0] * len(rows)
    for label, colour, values in _parts(rows):
        shares = [value / found.ranks[rank].seconds for value, (_, found, rank) in zip(values, rows, strict=True)]
        axis.barh(places, shares, left=ends, color=colour, label=label, edgecolor="#777777", linewidth=0.3)
        ends = [end + share for end, share in zip(ends, shares, strict=True)]
    axis.set_yticks(places, [f"{name}, rank {rank}" for name, _, rank in rows])
    _divide(axis, rows)
    axis.set(title="where a rank's step goes", xlim=(0, 1))
    axis.xaxis.set_major_formatter("{x:.0%}")
    _quiet(axis)
    axis.figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def _parts(rows: _Rows) -> list[tuple[str, str, list[float]]]:
    """Label, colour and seconds on each row, from left to right."""
    ranks = [found.ranks[rank] for _, found, rank in rows]
    parts = []
    for name, (forward, backward) in _colours(rows).items():
        parts.append((f"{name} forward", forward, [each.forward.get(name, 0.0) for each in ranks]))
        parts.append((f"{name} backward", backward, [each.backward.get(name, 0.0) for each in ranks]))
    parts += [(what, _GREY[what], [getattr(each, what) for each in ranks]) for what in (OPTIMIZER, EXCHANGE, WAITING)]
    return [*parts, ("other", _GREY["other"], [each.other for each in ranks])]


def _timeline(runs: Sequence[tuple[str, RunFigures]]) -> Any:
    """One step of every rank; what is exchanged within a pass covers it."""
    rows = _rows(runs)
    colours, figure = _colours(rows), _figure(len(rows))
    axis = figure.subplots()
    lines = [found.timelines()[rank] for _, found, rank in rows]
    longest = max(bar.end for bars in lines for bar in bars)
    for place, bars in enumerate(lines):
        for (what, module), spans in _merged(bars, longest / _FINEST).items():
            axis.broken_barh(spans, (place - 0.38, 0.76), color=_colour(what, module, colours))
    _divide(axis, rows)
    axis.set_yticks(range(len(rows)), [f"{name}, rank {rank}" for name, _, rank in rows])
    axis.set(title="one step of every rank", xlabel="seconds", xlim=(0, longest))
    _quiet(axis)
    _legend(figure, colours)
    return figure


def _legend(figure: Any, colours: dict[str, tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    named = {f"{name} {what}": pair[what == BACKWARD] for name, pair in colours.items() for what in (FORWARD, BACKWARD)}
    named |= {what: _GREY[what] for what in (OPTIMIZER, EXCHANGE, WAITING)}
    patches = [
        Patch(facecolor=colour, edgecolor="#777777", linewidth=0.3, label=name) for name, colour in named.items()
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def _merged(bars: Sequence[Bar], gap: float) -> dict[tuple[str, str | None], list[tuple[float, float]]]:
    """Begin and length of what is drawn alike, nearer ones than `gap` as one; what covers passes comes after them."""
    found: dict[tuple[str, str | None], list[tuple[float, float]]] = {}
    for bar in sorted(bars, key=lambda each: (each.what in (WAITING, EXCHANGE), each.begin)):
        spans = found.setdefault((bar.what, bar.module), [])
        if spans and bar.begin - sum(spans[-1]) < gap:
            spans[-1] = (spans[-1][0], bar.end - spans[-1][0])
        else:
            spans.append((bar.begin, bar.end - bar.begin))
    return found


def _divide(axis: Any, rows: _Rows) -> None:
    """A line between runs."""
    for place, (_, _, rank) in enumerate(rows):
        if place and rank == 0:
            axis.axhline(place - 0.5, color="#bbbbbb", linewidth=0.6)


def _colour(what: str, module: str | None, colours: dict[str, tuple[str, str]]) -> str:
    return _GREY[what] if module is None else colours[module][what == BACKWARD]


def _colours(rows: _Rows) -> dict[str, tuple[str, str]]:
    names = sorted({name for _, found, _ in rows for name in found.modules})
    return {name: _PAIRS[place % len(_PAIRS)] for place, name in enumerate(names)}


def _rows(runs: Sequence[tuple[str, RunFigures]]) -> _Rows:
    return [(name, found, rank) for name, found in runs for rank in range(len(found.ranks))]


def _figure(lines: int) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, _AROUND + _LINE * lines), layout="constrained")


def _quiet(axis: Any) -> None:
    """First line at the top, no frame, small labels."""
    axis.invert_yaxis()
    axis.tick_params(axis="both", labelsize=8)
    axis.title.set_fontsize(10)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
