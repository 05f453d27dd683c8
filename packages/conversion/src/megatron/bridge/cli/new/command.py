"""The command `megatron-bridge new`."""

from pathlib import Path

import click


@click.group(name="new")
def new() -> None:
    """Begin something of one's own."""


@new.command()
@click.argument("name")
@click.option(
    "--kind", required=True, help="What it adds; `megatron-bridge plugins --group plugin_templates` lists all."
)
@click.option("--into", type=click.Path(path_type=Path), default=Path(), help="Where its folder goes; here if not set.")
def plugin(name: str, kind: str, into: Path) -> None:
    """Write a package NAME that adds something to Megatron Bridge and passes its own tests."""
    from megatron.bridge.cli.new.kinds import TEMPLATES
    from megatron.bridge.cli.new.naming import names_of
    from megatron.bridge.cli.new.writing import write_plugin

    template = TEMPLATES[kind]
    folder = write_plugin(template, names_of(name), into)
    click.echo(f"{folder}: {template.summary}, for you to change. Install it and run its tests:")
    click.echo(f"  uv pip install -e {folder} {' '.join(('pytest', *template.tested_with))}")
    click.echo(f"  pytest {folder}")
