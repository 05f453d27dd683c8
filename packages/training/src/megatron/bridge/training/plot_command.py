"""`megatron-bridge plot`: a picture of the curves of one or several runs. Light until run."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.training.curves import Run

_PANELS = ("loss", "valid_loss", "learning_rate", "grad_norm", "tokens_per_second")
_FORMATS = (".png", ".svg", ".pdf")
# In inches; two panels stand side by side.
_PANEL_SIZE = (5.0, 3.2)


@click.command(name="plot")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--output", type=click.Path(path_type=Path), default=Path("curves.png"), show_default=True)
@click.option("--metric", "metrics", multiple=True, help="Metrics to draw, instead of the usual ones; repeat it.")
@click.option("--log", is_flag=True, help="Losses on a logarithmic axis.")
def plot(runs: tuple[Path, ...], output: Path, metrics: tuple[str, ...], log: bool) -> None:
    """Draw the curves of runs: folders with a metrics.jsonl, or such files.

    Losses, learning rate, gradient norm and speed, each run in a colour of its own. Steps that a resumed run did twice
    are drawn once, as the later record has them.
    """
    from megatron.bridge.training.curves import read_runs

    if importlib.util.find_spec("matplotlib") is None:
        raise BridgeError(
            "drawing needs the package matplotlib, which is not there: uv pip install 'megatron-bridge-training[plot]'"
        )
    if output.suffix not in _FORMATS:
        raise BridgeError(f"--output {output}: the name must end in one of {', '.join(_FORMATS)}")
    found = read_runs(list(runs))
    known = {name for run in found for name in run.curves}
    for name in metrics:
        if name not in known:
            raise BridgeError(f"no run has the metric {name!r}; there are {', '.join(sorted(known))}")
    panels = [name for name in metrics or _PANELS if name in known]
    figure = draw(found, panels, log)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    click.echo(f"{output}: {', '.join(panels)} of {', '.join(run.name for run in found)}")


def draw(runs: "list[Run]", panels: list[str], log: bool = False) -> Any:
    """A matplotlib figure with a panel for each of the metrics `panels`, and in it a line for each of the runs."""
    from matplotlib.figure import Figure

    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(_PANEL_SIZE[0] * columns, _PANEL_SIZE[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, metric in zip(axes, panels, strict=False):
        for number, run in enumerate(runs):
            points = run.curves.get(metric, [])
            # Few points are hard to see as a line.
            marker = "o" if len(points) <= 20 else None
            steps, values = [step for step, _ in points], [value for _, value in points]
            axis.plot(steps, values, label=run.name, color=f"C{number}", marker=marker, markersize=3)
        axis.set(title=metric.replace("_", " "), xlabel="iteration")
        axis.set_yscale("log" if log and "loss" in metric else "linear")
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.remove()
    if len(runs) > 1:
        axes[0].legend()
    return figure
