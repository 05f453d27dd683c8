"""`megatron-bridge mimo run|plan|draw`. Light until run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megatron.bridge.mimo.parallelism import DEPLOYMENT_MODES

if TYPE_CHECKING:
    from megatron.bridge.mimo.experiments.experiment import Experiment
    from megatron.bridge.mimo.experiments.running import Outcome


@click.group()
def mimo() -> None:
    """Several models, each with its own parallelism, trained as one."""


@mimo.command(name="run")
@click.option("--config", type=click.Path(path_type=Path), help="A YAML file of one experiment, or of a grid.")
@click.option("--experiments-dir", type=click.Path(path_type=Path), help="A folder of such files.")
@click.option("--recipe", help="The model of files that name none: a recipe, or module:function.")
@click.option("--nproc", type=click.IntRange(min=1), help="Ranks; as many as each placement takes, if left out.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps to time, instead of what the files say.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder of the report; where the files are, if left out."
)
@click.option("--timeout", type=click.FloatRange(min=1), default=600.0, show_default=True, help="Seconds for each.")
@click.option("--plots/--no-plots", default=True, help="Draw pictures; needs matplotlib.")
@click.option("--dry-run", is_flag=True, help="Check everything, show the placements, and start nothing.")
def run_command(
    config: Path | None,
    experiments_dir: Path | None,
    recipe: str | None,
    nproc: int | None,
    steps: int | None,
    output: Path | None,
    timeout: float,
    plots: bool,
    dry_run: bool,
) -> None:
    """Train a model for a few steps at each placement, and compare them.

    Each experiment runs on ranks of its own, started here one after another; under torchrun or srun all run on theirs.
    Everything is checked before the first one starts. Writes report.md, report.json and pictures; the exit code is 1
    when an experiment fails.
    """
    from megatron.bridge.mimo.experiments.reading import config_problems, files_of, read_experiments, refuse
    from megatron.bridge.mimo.experiments.running import run_as_rank, run_here
    from megatron.bridge.platform.distributed import launched, world_size
    from megatron.bridge.platform.engine import import_engine

    ranks = world_size() if launched() else nproc
    experiments = read_experiments(files_of(config, experiments_dir), recipe=recipe, ranks=ranks, steps=steps)
    if plots and not dry_run:
        _refuse_without_matplotlib()
    import_engine()
    refuse(config_problems(experiments))
    if dry_run:
        click.echo("\n\n".join(map(_described, experiments)))
        return
    run = run_as_rank if launched() else run_here
    outcomes = run(experiments, timeout, lambda line: click.echo(line, err=True))
    _report(outcomes, output or experiments_dir or (config or Path()).parent, plots=plots)


def _report(outcomes: "list[Outcome]", folder: Path, *, plots: bool) -> None:
    """Write and print the report on rank 0, and end with exit code 1 where an experiment failed."""
    from rich.console import Console

    from megatron.bridge import platform
    from megatron.bridge.mimo.experiments.report import table, verdict, write_report

    if platform.is_rank_zero():
        written = write_report(outcomes, folder, plots=plots)
        console = Console()
        # A file or a pipe has no width of its own, and 80 columns are too few.
        (console if console.is_terminal else Console(width=200)).print(table(outcomes))
        click.echo(verdict(outcomes))
        click.echo(f"written: {', '.join(map(str, written))}", err=True)
    if any(each.error is not None for each in outcomes):
        click.get_current_context().exit(1)


def _described(experiment: "Experiment") -> str:
    from megatron.bridge.mimo.drawing import draw_placement

    steps = f"{experiment.runtime.warmup_steps} + {experiment.runtime.steps} + {experiment.watched_steps} steps"
    head = f"{experiment.name}: {experiment.recipe}, {steps} of {experiment.num_microbatches} micro-batches"
    return f"{head}\n{draw_placement(experiment.placement, experiment.ranks)}"


@mimo.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--svg", type=click.Path(path_type=Path), help="Draw into this file; of a grid into several.")
def draw(config: Path, svg: Path | None) -> None:
    """Draw the placements of an experiment's file: which part of which module each rank holds.

    What cannot work is drawn too, and then refused.
    """
    from megatron.bridge.mimo.drawing import draw_placement
    from megatron.bridge.mimo.drawing_svg import placement_svg
    from megatron.bridge.mimo.experiments.reading import placement_problems, read_placements, refuse

    experiments = read_placements([config])
    for number, each in enumerate(experiments, start=1):
        if svg is None:
            click.echo(f"{each.name}\n{draw_placement(each.placement, each.ranks)}\n")
        else:
            file = svg if len(experiments) == 1 else svg.with_stem(f"{svg.stem}-{number}")
            file.write_text(placement_svg(each.placement, each.ranks, title=each.name), encoding="utf-8")
            click.echo(f"{file}: {each.name}")
    refuse([f"{each.name}: {problem}" for each in experiments for problem in placement_problems(each)])


@mimo.command()
@click.option("--llm", metavar="FOLDER", help="Hugging Face folder or hub id of the language model.")
@click.option("--encoder", "encoders", multiple=True, metavar="NAME=FOLDER", help="Of an encoder; may be repeated.")
@click.option("--recipe", help="A MIMO recipe instead: its name, or module:function.")
@click.option("--gpus", required=True, metavar="16xH100", help="How many of what.")
@click.option("--seq", "seq_length", type=click.IntRange(min=1), help="Tokens per sample, those of the items included.")
@click.option("--items", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Items in a sample.")
@click.option("--frozen", multiple=True, metavar="NAME", help="An encoder that is not trained; may be repeated.")
@click.option("--global-batch-size", "global_batch", type=click.IntRange(min=1), help="Samples per step.")
@click.option("--mode", type=click.Choice(DEPLOYMENT_MODES), help="Look at one mode only.")
@click.option("--top", default=1, show_default=True, type=click.IntRange(min=1), help="How many of the best of a mode.")
@click.option("--hardware", type=click.Path(), help="YAML file of further accelerators.")
@click.option("--write", type=click.Path(path_type=Path), help="Write each placement as a file for `mimo run`.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(gpus: str, hardware: str | None, top: int, write: Path | None, as_json: bool, **asked: Any) -> None:
    """Propose placements: memory and time of each module, in every mode, by the cost model of `megatron-bridge plan`.

    Nothing is built. Refuses what cannot run, or does not fit.
    """
    import json

    from megatron.bridge.mimo.planner.asking import question
    from megatron.bridge.mimo.planner.report import as_data, as_text, write_experiments
    from megatron.bridge.mimo.planner.search import best
    from megatron.bridge.training.planner.hardware import cluster

    asked["language"] = asked.pop("llm")
    posed = question(cluster(gpus, hardware), **asked)
    found = best(posed, top)
    click.echo(json.dumps(as_data(posed, found), indent=2) if as_json else as_text(posed, found))
    if write is not None:
        files = write_experiments(found, posed, write, asked["recipe"])
        click.echo(f"written: {', '.join(map(str, files))}", err=True)


def _refuse_without_matplotlib() -> None:
    import importlib.util

    from megatron.bridge.errors import BridgeError

    if importlib.util.find_spec("matplotlib") is None:
        raise BridgeError(
            "drawing needs the package matplotlib, which is not there: give --no-plots, or uv pip install "
            "'megatron-bridge-training[plot]'"
        )
