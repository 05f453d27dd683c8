"""A recipe as a script: `main(recipe)` trains by it, with overrides from the command line. Light until it trains."""

import click

from megatron.bridge.recipes.base.description import Description
from megatron.bridge.recipes.base.recipe import Recipe


def main(recipe: Recipe | Description) -> None:
    """Train by a recipe, as the only process or as a rank of torchrun or srun. Exits with 1 where something is refused.

    Args:
        recipe: of this package, or a description such as `megatron-bridge recipes cp` writes.
    """
    description = recipe.describe() if isinstance(recipe, Recipe) else recipe

    @click.command(context_settings={"help_option_names": ["-h", "--help"]})
    @click.option("--dry-run", is_flag=True, help="Check everything, print the configuration, and train nothing.")
    @click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")
    def command(dry_run: bool, overrides: tuple[str, ...]) -> None:
        """Train by this recipe; overrides change single fields of it: train.train_iters=10 optimizer.lr=1e-4."""
        from megatron.bridge.cli.root import Refusal
        from megatron.bridge.errors import BridgeError

        try:
            _run(description, overrides, dry_run=dry_run)
        except BridgeError as error:
            raise Refusal(str(error)) from error

    command()


def _run(description: Description, overrides: tuple[str, ...], *, dry_run: bool) -> None:
    from megatron.bridge.recipes.base.building import build
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.overrides import apply_overrides
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.run_config import to_yaml

    cfg = build(description)
    apply_overrides(cfg, overrides)
    if dry_run:
        cfg.validate()
        click.echo(to_yaml(cfg), nl=False)
    elif description.task == "finetune":
        finetune(cfg)
    else:
        pretrain(cfg, forward_step)
