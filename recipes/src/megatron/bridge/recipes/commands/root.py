"""`megatron-bridge recipes ls|show|cp|diff|try`. Torch-free, but for `try`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from megatron.bridge.recipes.base.stated import Stated

_ARGUMENTS = click.argument("arguments", nargs=-1, metavar="[ARGUMENT=VALUE]...")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(name="recipes")
def recipes() -> None:
    """List, explain, compare and copy recipes."""


@recipes.command(name="ls")
@click.argument("words", nargs=-1)
@_JSON
def list_recipes(words: tuple[str, ...], as_json: bool) -> None:
    """List models that there are recipes for; with WORDS those whose name or title has them all."""
    from megatron.bridge.recipes.commands.listing import listed, table

    found = listed(words)
    click.echo(json.dumps(found, indent=2) if as_json else table(found))


@recipes.command()
@click.argument("name")
@_ARGUMENTS
@_JSON
def show(name: str, arguments: tuple[str, ...], as_json: bool) -> None:
    """Say what a recipe sets, and who says so: a paper, a model card, or this project with its reason.

    ARGUMENT=VALUE are those of its function: seq_length=32768 gpus=64xH100.
    """
    from megatron.bridge.recipes.commands.lookup import described

    values = described(name, arguments).values
    if as_json:
        click.echo(json.dumps({key: vars(each) for key, each in values.items()}, indent=2, default=str))
        return
    for key, each in values.items():
        click.echo(f"{key} = {json.dumps(each.value, default=str)}  {click.style(each.source, dim=True)}")


@recipes.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@_ARGUMENTS
def cp(name: str, file: Path, arguments: tuple[str, ...]) -> None:
    """Write a recipe out as a Python file of values, to be changed and run: `uv run FILE [SECTION.FIELD=VALUE]...`."""
    from megatron.bridge.recipes.commands.copying import write
    from megatron.bridge.recipes.commands.lookup import described

    write(file, name, described(name, arguments))
    click.echo(f"{file} is yours: change it, then `uv run {file}`")


@recipes.command()
@click.argument("first")
@click.argument("second")
@click.pass_context
def diff(ctx: click.Context, first: str, second: str) -> None:
    """Compare two recipes. Exit code 1 when they differ."""
    from megatron.bridge.recipes.commands.lookup import described

    ours, theirs = described(first).values, described(second).values
    differing = [key for key in {**ours, **theirs} if _value(ours, key) != _value(theirs, key)]
    for key in differing:
        click.echo(f"{key}: {_value(ours, key)} -> {_value(theirs, key)}")
    click.echo(f"{len(differing)} values differ" if differing else "no value differs")
    if differing:
        ctx.exit(1)


@recipes.command(name="try")
@click.argument("names", nargs=-1, required=True)
def try_recipes(names: tuple[str, ...]) -> None:
    """Train a tiny variant of each recipe for two steps here, on mock data: the same code, small sizes."""
    from megatron.bridge.platform.engine import import_engine
    from megatron.bridge.recipes.base.trial import trial
    from megatron.bridge.recipes.commands.lookup import described

    wanted = {name: described(name) for name in names}
    import_engine()
    for name, each in wanted.items():
        losses = trial(each).losses.values()
        click.echo(f"{name}: losses {', '.join(f'{loss:.3f}' for loss in losses)}")


def _value(values: "Mapping[str, Stated]", key: str) -> str:
    return json.dumps(values[key].value, default=str) if key in values else "(default)"
