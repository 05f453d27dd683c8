"""`megatron-bridge config`: look at a configuration before anything runs. Light until run."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

_CHANGES = (
    click.option("--recipe", required=True, help="Name of a recipe; `megatron-bridge plugins` lists them."),
    click.option("--config", type=click.Path(), help="YAML file of sections, e.g. a checkpoint's run_config.yaml."),
    click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]..."),
)


def _of_a_run[F: Callable[..., Any]](command: F) -> F:
    """The arguments that `megatron-bridge train` takes too."""
    for option in reversed(_CHANGES):
        command = option(command)
    return command


@click.group(name="config")
def config() -> None:
    """Show, explain and compare the configurations of runs."""


@config.command()
@_of_a_run
def show(recipe: str, config: str | None, overrides: tuple[str, ...]) -> None:
    """Print as YAML what a run would be configured with; what has its default is left out."""
    from megatron.bridge.training.run_config import to_yaml

    cfg = _made(recipe)
    for _, apply in _layers(config, overrides):
        apply(cfg)
    click.echo(to_yaml(cfg), nl=False)


@config.command()
@_of_a_run
@click.option("--all", "everything", is_flag=True, help="Values that have their default, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(recipe: str, config: str | None, overrides: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Say of each value where it came from: the recipe, the file, an override, or its default."""
    from megatron.bridge.training.config_origins import explained

    found = explained(_made(recipe), _layers(config, overrides))
    found = [each for each in found if everything or each.origin != "default"]
    if as_json:
        click.echo(json.dumps([vars(each) for each in found], indent=2))
        return
    for each in found:
        click.echo(f"{each.key} = {json.dumps(each.value)}  {click.style(each.origin, dim=True)}")


@config.command()
@click.argument("first")
@click.argument("second")
@click.pass_context
def diff(ctx: click.Context, first: str, second: str) -> None:
    """Compare two configurations: recipes by name, YAML files, or checkpoints. Exit code 1 when they differ."""
    ours, theirs = _flat(first), _flat(second)
    differing = [key for key in sorted(ours | theirs) if ours.get(key, _ABSENT) != theirs.get(key, _ABSENT)]
    for key in differing:
        click.echo(f"{key}: {_shown(ours, key)} -> {_shown(theirs, key)}")
    click.echo(f"{len(differing)} values differ" if differing else "no value differs")
    if differing:
        ctx.exit(1)


_ABSENT = object()


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "(default)"


@config.command()
@click.option("--recipe", required=True, help="Whose sections to describe.")
def schema(recipe: str) -> None:
    """Print a JSON Schema of all that can be set, for editors and for tools that write configurations."""
    from megatron.bridge.training.config_schema import json_schema

    click.echo(json.dumps(json_schema(_made(recipe)), indent=2))


def _made(recipe: str) -> "ConfigContainer":
    """What a recipe makes by itself."""
    from megatron.bridge.platform.engine import import_engine
    from megatron.bridge.training.recipe_registry import RECIPES

    make = RECIPES[recipe]
    import_engine()
    cfg: ConfigContainer = make()
    return cfg


def _layers(config: str | None, overrides: tuple[str, ...]) -> "list[tuple[str, Callable[[ConfigContainer], None]]]":
    """What is applied to a recipe, by the name of where it comes from."""
    from megatron.bridge.training.overrides import apply_overrides, apply_yaml

    given = ("override", partial(apply_overrides, overrides=overrides))
    return [given] if config is None else [(config, partial(apply_yaml, path=config)), given]


def _flat(name: str) -> dict[str, Any]:
    """Dotted key -> value of what `name` means, without defaults."""
    from megatron.bridge.training.config_origins import values_of
    from megatron.bridge.training.recipe_registry import RECIPES

    if name in RECIPES:
        return {each.key: each.value for each in values_of(_made(name)) if not each.is_default}
    return dict(_leaves(_written(name)))


def _written(name: str) -> dict[str, Any]:
    """The sections of a YAML file, or of the one in a checkpoint."""
    from megatron.bridge.conversion.checkpoint_layout import resolve
    from megatron.bridge.training.overrides import read_sections
    from megatron.bridge.training.recipe_registry import RECIPES
    from megatron.bridge.training.side_files import RUN_CONFIG

    path = Path(name)
    if not path.exists():
        RECIPES[name]  # refuses the name, with those that are near
    return read_sections(resolve(path) / RUN_CONFIG if path.is_dir() else path)


def _leaves(content: dict[str, Any], prefix: str = "") -> "list[tuple[str, Any]]":
    from megatron.bridge.training.overrides import CLASS_KEY

    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        within = isinstance(value, dict) and (CLASS_KEY in value or not prefix)
        found += _leaves(value, f"{prefix}{key}.") if within else [(f"{prefix}{key}", value)]
    return [(key, value) for key, value in found if not key.endswith(CLASS_KEY)]
