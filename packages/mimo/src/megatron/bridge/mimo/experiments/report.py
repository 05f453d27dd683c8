"""The report over all runs: a table for the terminal, the same in Markdown, everything in JSON. Torch-free."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.mimo.drawing import written
from megatron.bridge.mimo.experiments.figures import RunFigures
from megatron.bridge.mimo.experiments.running import Outcome

if TYPE_CHECKING:
    from rich.table import Table

_BY_MODULE = ("modules", "forward + backward ms")
_WORDS = ("experiment", "mode", *_BY_MODULE)


def ordered(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that did most for each rank first; those that failed last."""
    return sorted(outcomes, key=lambda each: -each.figures.samples_per_second_and_rank if each.figures else 0.0)


def cells(outcome: Outcome) -> dict[str, str]:
    """One line of the table, by column."""
    experiment, found = outcome.experiment, outcome.figures
    line = {
        "experiment": experiment.name,
        "mode": experiment.mode,
        "modules": written(experiment.placement),
        "ranks": str(experiment.ranks),
        "batches": str(experiment.num_microbatches),
    }
    if found is None:
        return line | {"step ms (fastest)": "failed"}
    line |= {
        "step ms (fastest)": f"{1e3 * found.seconds:.0f} ({1e3 * found.fastest_seconds:.0f})",
        "samples/s": f"{found.samples_per_second:,.0f}",
        "tokens/s": f"{found.tokens_per_second:,.0f}",
        "peak MiB": f"{found.memory_bytes / 2**20:,.0f}",
    }
    done = found.flops_per_second_and_rank
    line["GFLOP/s/rank"] = "" if done is None else f"{done / 1e9:,.1f}"
    if found.mfu is not None:
        line["MFU"] = f"{found.mfu:.1%}"
    return line | (_watched_cells(found) if found.watched else {})


def _watched_cells(found: RunFigures) -> dict[str, str]:
    each_module = [(name, found.module_seconds(name)) for name in found.modules]
    sent = max(rank.exchange_bytes for rank in found.ranks)
    return {
        "forward + backward ms": ", ".join(f"{name} {1e3 * a:.1f} + {1e3 * b:.1f}" for name, (a, b) in each_module),
        "bubble": f"{found.bubble:.0%}",
        "exchange": f"{found.exchange_share:.0%}",
        "exchanged MiB": f"{sent / 2**20:.2f}",
    }


def table(outcomes: Sequence[Outcome]) -> "Table":
    """For the terminal."""
    from rich.table import Table

    lines = [cells(each) for each in ordered(outcomes)]
    found = Table(title="megatron-bridge mimo run")
    for column in _columns(lines):
        found.add_column(column, justify="left" if column in _WORDS else "right", no_wrap=column in _WORDS)
    for line in lines:
        found.add_row(*(_stacked(column, line.get(column, "")) for column in _columns(lines)))
    return found


def _stacked(column: str, cell: str) -> str:
    """A module to a line."""
    return cell.replace(", ", "\n") if column in _BY_MODULE else cell


def _columns(lines: Sequence[Mapping[str, str]]) -> list[str]:
    return list(dict.fromkeys(column for line in lines for column in line))


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The table, who wins, and why others failed."""
    lines = [cells(each) for each in ordered(outcomes)]
    columns = _columns(lines)
    rows = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    rows += ["| " + " | ".join(line.get(column, "") for column in columns) + " |" for line in lines]
    failed = [_failure(each) for each in outcomes if each.error is not None]
    return "\n".join([*rows, "", *filter(None, [verdict(outcomes)]), *failed]) + "\n"


def _failure(outcome: Outcome) -> str:
    return f"\n`{outcome.experiment.name}` failed:\n\n```text\n{outcome.error}\n```"


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Who does most for each rank, and what of a step made the difference; nothing where there is nobody to beat."""
    ran = [(each.experiment.name, each.figures) for each in ordered(outcomes) if each.figures is not None]
    if len(ran) < 2:
        return ""
    (first, won), (second, lost) = ran[:2]
    ahead = won.samples_per_second_and_rank / lost.samples_per_second_and_rank - 1
    told = f"{first!r} does most for each rank: {ahead:.0%} more than {second!r}."
    if won.watched and lost.watched:
        shares = [
            f"{name} {share(won):.0%} of a step (there {share(lost):.0%})"
            for name, share in (
                ("its ranks compute for", lambda run: run.compute_share),
                ("wait for each other for", lambda run: run.bubble),
                ("and exchange for", lambda run: run.exchange_share),
            )
        ]
        told += f" On average {', '.join(shares)}."
    return told


def as_data(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Everything, in seconds, bytes and operations."""
    return [_as_data(each) for each in outcomes]


def _as_data(outcome: Outcome) -> dict[str, Any]:
    experiment, found = outcome.experiment, outcome.figures
    data: dict[str, Any] = {
        **dataclasses.asdict(experiment),
        "mode": experiment.mode,
        "ranks": experiment.ranks,
        "num_microbatches": experiment.num_microbatches,
        "error": outcome.error,
    }
    if found is None:
        return data
    names = (
        "seconds",
        "fastest_seconds",
        "samples",
        "tokens",
        "samples_per_second",
        "tokens_per_second",
        "memory_bytes",
    )
    data |= {name: getattr(found, name) for name in (*names, "flops_per_second_and_rank", "mfu")}
    if found.watched:
        data["modules"] = {
            name: {"forward": forward, "backward": backward, "samples_per_second": found.samples / (forward + backward)}
            for name, (forward, backward) in ((name, found.module_seconds(name)) for name in found.modules)
        }
        data |= {"bubble": found.bubble, "exchange_share": found.exchange_share}
        data["by_rank"] = [
            {**dataclasses.asdict(rank), "bubble": rank.bubble, "timeline": [dataclasses.asdict(bar) for bar in bars]}
            for rank, bars in zip(found.ranks, found.timelines(), strict=True)
        ]
    return data


def write_report(outcomes: Sequence[Outcome], folder: Path, *, plots: bool) -> list[Path]:
    """Write `report.md`, `report.json` and, with `plots`, the pictures; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "report.md", folder / "report.json"]
    files[0].write_text(markdown(outcomes), encoding="utf-8")
    files[1].write_text(json.dumps(as_data(outcomes), indent=1) + "\n", encoding="utf-8")
    if plots and any(each.figures is not None for each in outcomes):
        from megatron.bridge.mimo.experiments.pictures import draw

        for name, figure in draw(ordered(outcomes)).items():
            files.append(folder / f"{name}.svg")
            figure.savefig(files[-1])
    return files
