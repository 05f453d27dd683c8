"""The root of the command line: a click group whose commands are plugins, loaded when they are used.

A command is offered under the entry-point group `megatron.bridge.commands`. Its module must be light: the help of the
root shows one line of every command, so what takes long is imported inside the command's function.
"""

import sys
from collections.abc import Sequence
from typing import IO

import click

from megatron.bridge.cli.distributions import OURS, home_of_command
from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.registry import Registry, RegistryError

EXIT_REFUSED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def _is_command(value: object) -> bool:
    """a click command or group"""
    return isinstance(value, click.Command)


COMMANDS: Registry[click.Command] = Registry("megatron.bridge.commands", _is_command, "command")


class Refusal(click.ClickException):
    """A `BridgeError` on its way to the terminal: printed without a traceback, exit code 1."""

    exit_code = EXIT_REFUSED

    def show(self, file: IO[str] | None = None) -> None:
        """Print the message to stderr, or to `file`."""
        click.echo(f"{click.style('error:', fg='red', bold=True)} {self.format_message()}", file=file, err=file is None)


class PluginGroup(click.Group):
    """A click group whose commands come from `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the installed commands, sorted. Imports none."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load one command; None when nothing offers the name."""
        if cmd_name not in COMMANDS:
            return None
        try:
            return COMMANDS[cmd_name]
        except RegistryError:
            if ctx.resilient_parsing:  # a broken command must not spoil the shell's completion of the others
                return None
            raise

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with near names or the distribution to install when nothing offers the command."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            home = home_of_command(name)
            hint = f"; it comes with the package {home!r} (uv pip install {home})" if home else ""
            ctx.fail(f"no command is called {name!r}{hint or did_you_mean(name, COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> None:
        """Run the sub-command. Its return value is dropped: click could not tell an int from an exit code."""
        try:
            super().invoke(ctx)
        except BridgeError as error:
            if ctx.params.get("debug"):
                raise
            raise Refusal(str(error)) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One line per command; a broken one is listed with the reason and does not spoil the others."""
        names = self.list_commands(ctx)
        room = formatter.width - max(map(len, names), default=0) - 4  # for the indent and the gap between columns
        rows = [row for name in names if (row := _help_row(name, room)) is not None]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def _help_row(name: str, room: int) -> tuple[str, str] | None:
    origins = [offer.origin for offer in COMMANDS.offers(name) if offer.distribution not in OURS]
    origin = f" [{', '.join(origins)}]" if origins else ""
    try:
        command = COMMANDS[name]
    except RegistryError as error:
        return name, f"BROKEN: {error}"
    return None if command.hidden else (name, command.get_short_help_str(limit=max(room - len(origin), 20)) + origin)


@click.group(cls=PluginGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="megatron-bridge-conversion", prog_name="megatron-bridge")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Convert between Hugging Face and Megatron-Core, and train, with proof of every step."""


def run(args: Sequence[str]) -> int:
    """Run the command line `args` (without the program's name).

    Returns:
        The exit code: 0; 1 when something was refused (also with --debug) or failed; 2 for a usage error;
        130 after Ctrl-C.
    """
    try:
        code = cli.main(args=list(args), prog_name="megatron-bridge", standalone_mode=False)
    except click.Abort as abort:
        interrupted = isinstance(abort.__cause__, KeyboardInterrupt)
        click.echo("interrupted" if interrupted else "aborted", err=True)
        return EXIT_INTERRUPTED if interrupted else EXIT_REFUSED
    except click.ClickException as refusal:
        refusal.show()
        return refusal.exit_code
    except BridgeError:
        import traceback

        traceback.print_exc()
        return EXIT_REFUSED
    return code if isinstance(code, int) else 0


def main() -> None:
    """The console script `megatron-bridge`."""
    sys.exit(run(sys.argv[1:]))
