"""`megatron-bridge mimo run`: placements measured side by side. Light until run."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from megatron.bridge.mimo.experiments.experiment import Experiment
    from megatron.bridge.mimo.experiments.measure import Measurement


@click.group()
def mimo() -> None:
    """Several models, each with its own parallelism."""


@mimo.command("run")
@click.option("--config", type=click.Path(path_type=Path), help="A YAML file: one experiment.")
@click.option("--experiments-dir", type=click.Path(path_type=Path), help="A folder of such files.")
@click.option("--output", type=click.Path(path_type=Path), help="Where the report goes; the experiments' folder.")
@click.option("--timeout", type=click.FloatRange(1), default=600.0, show_default=True, help="Seconds for each.")
def run_command(config: Path | None, experiments_dir: Path | None, output: Path | None, timeout: float) -> None:
    """Train each experiment's model for a few steps, on as many processes of this machine as it takes, and compare.

    Every file is checked before the first one runs. Writes report.md, report.json and, with matplotlib, report.svg.
    """
    from megatron.bridge.mimo.experiments.experiment import read_experiments
    from megatron.bridge.mimo.experiments.report import Result, table, write_report

    experiments = read_experiments(config, experiments_dir)
    results = []
    for each in experiments:
        click.echo(f"{each.name}: {each.runtime.pipeline_schedule} on {each.ranks} ranks", err=True)
        results.append(Result(each, _measured(each, timeout)))
    folder = output or experiments_dir or (config.parent if config is not None else Path())
    written = write_report(results, folder)
    click.echo(table(results), nl=False)
    click.echo(f"written: {', '.join(map(str, written))}", err=True)


def _measured(experiment: "Experiment", timeout: float) -> "list[Measurement]":
    from megatron.bridge.mimo.experiments.measure import measure
    from megatron.bridge.platform.engine import import_engine
    from megatron.bridge.platform.launch import run_ranks

    import_engine()
    return run_ranks(experiment.ranks, measure, experiment, timeout=timeout)
