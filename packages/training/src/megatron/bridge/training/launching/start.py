"""The options of commands that start a run, and what becomes of them. Light until a run starts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.launching import LAUNCHERS, Job, Launcher

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

_OPTIONS = (
    click.option("--launcher", help="What starts the ranks: local (the default), torchrun, slurm, or a plugin's."),
    click.option("--nproc", type=click.IntRange(min=1), help="Start this many ranks on each node."),
    click.option("--nodes", type=click.IntRange(min=1), help="Number of nodes."),
    click.option(
        "--launch", "settings", multiple=True, metavar="FIELD=VALUE", help="A setting of the launcher; may be repeated."
    ),
    click.option("--launch-config", "settings_file", type=click.Path(), help="YAML file of the launcher's settings."),
    click.option("--dry-run", is_flag=True, help="Check everything, show what would be started, and start nothing."),
)


@dataclass(frozen=True, kw_only=True)
class Launching:
    """The options above, as given."""

    launcher: str | None
    nproc: int | None
    nodes: int | None
    settings: tuple[str, ...]
    settings_file: str | None
    dry_run: bool

    @property
    def asked(self) -> bool:
        """Whether any of them was given."""
        return bool(self.launcher or self.nproc or self.nodes or self.settings or self.settings_file or self.dry_run)

    def make(self) -> Launcher:
        """The launcher, with its settings.

        Raises:
            BridgeError: nobody offers it, or it has no such setting.
        """
        from megatron.bridge.training.overrides import apply_overrides, apply_yaml

        launcher: Launcher = LAUNCHERS[self.launcher or "local"]()
        if self.settings_file is not None:
            apply_yaml(launcher, self.settings_file)
        apply_overrides(launcher, self.settings)
        return launcher


def launching_options[F: Callable[..., Any]](command: F) -> F:
    """Give a click command the options of `Launching`; the command hands them on as `Launching(**options)`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class Command(Protocol):
    """A command that trains, as it was given; called, it does the part of one rank."""

    @property
    def name(self) -> str:
        """Of the job in a queue."""

    @property
    def run_folder(self) -> str | None:
        """Where all of the run is written."""

    @property
    def resume(self) -> bool:
        """Whether to go on with what is there."""

    def arguments(self, *, resume: bool) -> tuple[str, ...]:
        """The words after `megatron-bridge` for one rank."""

    def configured(self) -> "ConfigContainer":
        """What it is to run."""

    def __call__(self) -> None:
        """Run one rank."""


def start(command: Command, launching: Launching) -> None:
    """Run `command` in this process where that is one of a launcher's ranks; otherwise start its ranks.

    Raises:
        BridgeError: the command and the launcher do not fit, or the configuration cannot run on what it would get.
    """
    from megatron.bridge.platform.distributed import launched

    if command.resume and command.run_folder is None:
        raise BridgeError("--resume goes on with the run in --run-folder; name that folder")
    if launched():
        if launching.asked:
            raise BridgeError("a launcher has started this process as one of its ranks; drop --nproc, --launcher, ...")
        command()
    elif not launching.asked and command.run_folder is None:
        command()  # which checks the configuration itself
    else:
        _launch(command, launching)


def _launch(command: Command, launching: Launching) -> None:
    launcher = launching.make()
    nodes, ranks = launching.nodes or 1, launching.nproc or 1
    job = Job(
        name=command.name,
        arguments=command.arguments(resume=command.resume),
        restartable=command.arguments(resume=command.run_folder is not None),
        work=command,
        nodes=nodes,
        ranks_per_node=ranks,
        run_folder=None if command.run_folder is None else Path(command.run_folder).absolute(),
    )
    _refuse(launcher, job)
    cfg = _checked(command, launcher, nodes * ranks)
    if launching.dry_run:
        click.echo(launcher.describe(job).rstrip())
    else:
        launcher.launch(replace(job, timeout_seconds=cfg.dist.timeout_seconds))


def _checked(command: Command, launcher: Launcher, world_size: int) -> "ConfigContainer":
    """The configuration, found able to run. Here refusals come once, and before a queue has been waited for."""
    from megatron.bridge.platform.engine import import_engine

    # Ranks that are forked from this process find everything imported.
    import_engine()
    cfg = command.configured()
    cfg.validate(world_size, launcher.sight())
    return cfg


def _refuse(launcher: Launcher, job: Job) -> None:
    from megatron.bridge.training.validation import ConfigError, report

    problems = list(launcher.problems(job))
    if problems:
        raise ConfigError(report("the run cannot be launched", problems))
