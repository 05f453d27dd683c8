"""The report over experiments: a table, JSON, and a picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.mimo.experiments.experiment import SCHEDULES, Experiment
from megatron.bridge.mimo.experiments.measure import Measurement


@dataclass(frozen=True)
class Result:
    """One experiment with what every rank measured."""

    experiment: Experiment
    ranks: Sequence[Measurement]

    @property
    def seconds(self) -> float:
        """Of a step: the slowest rank's."""
        return max(each.seconds for each in self.ranks)

    @property
    def samples(self) -> int:
        """Of a step, over all replicas."""
        runtime, language = self.experiment.runtime, self.experiment.model.llm_module_name
        layout = self.experiment.placement().module_parallelisms[language]
        return runtime.base_batch_size * runtime.num_microbatches * layout.data_parallel

    @property
    def samples_per_second_and_rank(self) -> float:
        """What experiments on unlike numbers of ranks are compared by."""
        return self.samples / self.seconds / len(self.ranks)

    @property
    def bubble(self) -> float:
        """The share of a step in which a stage of this pipeline has nothing to do, were all stages alike."""
        modules = self.experiment.placement().module_parallelisms
        language = modules[self.experiment.model.llm_module_name].pipeline_parallel
        apart = SCHEDULES[self.experiment.runtime.pipeline_schedule] == "heterogeneous"
        stages = language + apart
        return (stages - 1) / (self.experiment.runtime.num_microbatches + stages - 1)

    @property
    def exchange_share(self) -> float:
        """The mean share of a rank's step in exchanges, and in waiting for them."""
        return sum(each.exchange_seconds / each.seconds for each in self.ranks) / len(self.ranks)

    def forward_seconds(self, module: str) -> float:
        """The longest that a rank was in a module's forward passes, in a step."""
        return max((each.forward_seconds.get(module, 0.0) for each in self.ranks), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "name": self.experiment.name,
            "model": asdict(self.experiment.model),
            "runtime": asdict(self.experiment.runtime),
            "seconds": self.seconds,
            "samples_per_second": self.samples / self.seconds,
            "samples_per_second_and_rank": self.samples_per_second_and_rank,
            "bubble": self.bubble,
            "exchange_share": self.exchange_share,
            "ranks": [asdict(each) for each in self.ranks],
        }


def table(results: Sequence[Result]) -> str:
    """Markdown: a line for each experiment, the fastest for each rank first, and why it leads."""
    ordered = sorted(results, key=lambda each: -each.samples_per_second_and_rank)
    head = "| experiment | schedule | ranks | step s | samples/s | per rank | forward s | exchange | bubble | MiB |"
    lines = [head, "|---" * 10 + "|", *map(_line, ordered)]
    if len(ordered) > 1:
        first, second = ordered[:2]
        ahead = first.samples_per_second_and_rank / second.samples_per_second_and_rank - 1
        lines += [
            "",
            f"{first.experiment.name} does most for each rank, {ahead:.0%} more than {second.experiment.name}: "
            f"{first.exchange_share:.0%} of its ranks' time goes into exchanges and waiting, against "
            f"{second.exchange_share:.0%}.",
        ]
    return "\n".join(lines) + "\n"


def _line(result: Result) -> str:
    modules = result.experiment.model.module_parallelisms
    forward = ", ".join(f"{name} {result.forward_seconds(name):.3f}" for name in modules)
    memory = max(each.memory_bytes for each in result.ranks) / 2**20
    return (
        f"| {result.experiment.name} | {result.experiment.runtime.pipeline_schedule} | {len(result.ranks)} | "
        f"{result.seconds:.3f} | {result.samples / result.seconds:.1f} | {result.samples_per_second_and_rank:.2f} | "
        f"{forward} | {result.exchange_share:.0%} | {result.bubble:.0%} | {memory:.0f} |"
    )


def write_report(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write `report.md`, `report.json` and, where matplotlib is there, `report.svg`; returns what was written."""
    import importlib.util

    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "report.md", folder / "report.json"]
    written[0].write_text(table(results), encoding="utf-8")
    written[1].write_text(json.dumps([each.as_dict() for each in results], indent=1), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        written.append(folder / "report.svg")
        draw(results).savefig(written[-1])
    return written


def draw(results: Sequence[Result]) -> Any:
    """A matplotlib figure: throughput of each experiment, and where each rank's step goes."""
    from matplotlib.figure import Figure

    bars = [(result, rank, each) for result in results for rank, each in enumerate(result.ranks)]
    figure = Figure(figsize=(9.0, 1.6 + 0.3 * len(bars)), layout="constrained")
    speed, spent = figure.subplots(1, 2, width_ratios=[1, 2])
    names = [result.experiment.name for result in results]
    speed.barh(names, [result.samples_per_second_and_rank for result in results], color="C0")
    speed.set(title="samples per second and rank")
    speed.invert_yaxis()
    labels = [f"{result.experiment.name}, rank {rank}: {', '.join(each.modules)}" for result, rank, each in bars]
    ends = [0.0] * len(bars)
    for number, (name, values) in enumerate(_parts([each for _, _, each in bars]).items()):
        spent.barh(labels, values, left=ends, label=name, color=f"C{number}")
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    spent.set(title="a step of each rank", xlabel="seconds")
    spent.tick_params(axis="y", labelsize=7)
    spent.invert_yaxis()
    spent.legend(fontsize=7)
    return figure


def _parts(ranks: Sequence[Measurement]) -> dict[str, list[float]]:
    forward = [sum(each.forward_seconds.values()) for each in ranks]
    exchange = [each.exchange_seconds for each in ranks]
    rest = [each.seconds - a - b for each, a, b in zip(ranks, forward, exchange, strict=True)]
    return {"forward": forward, "backward, optimizer, other": rest, "exchanges and waiting": exchange}
