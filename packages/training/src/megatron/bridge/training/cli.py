"""`megatron-bridge train`: a recipe, changed by a file and by overrides, on one or several ranks. Light until run."""

from typing import TYPE_CHECKING

import click

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


@click.command(name="train", context_settings={"ignore_unknown_options": False})
@click.option("--recipe", required=True, help="Name of a recipe; `megatron-bridge plugins` lists them.")
@click.option("--config", type=click.Path(), help="YAML file of sections, e.g. a checkpoint's run_config.yaml.")
@click.option("--nproc", type=click.IntRange(min=1), help="Start this many ranks on this machine.")
@click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")
def train(recipe: str, config: str | None, nproc: int | None, overrides: tuple[str, ...]) -> None:
    """Train by a recipe.

    Overrides change single fields of it: train.train_iters=10 model.tensor_model_parallel_size=2. Under torchrun or
    srun the ranks are theirs; --nproc starts ranks here. Ctrl-C saves a checkpoint, where checkpoint.save is set, and
    says how to resume.
    """
    if nproc is None or nproc == 1:
        _run(recipe, config, overrides)
        return
    from megatron.bridge.platform import world_size
    from megatron.bridge.platform.engine import import_engine
    from megatron.bridge.platform.launch import run_ranks, share_of_cores, signals_left_to_ranks

    if world_size() > 1:
        raise BridgeError(f"--nproc {nproc} starts ranks, but a launcher has started {world_size()} already; drop one")
    # In the parent: refusals come once, and the ranks are forked from a process that has imported everything.
    import_engine()
    cfg = configured(recipe, config, overrides)
    cfg.validate(nproc)
    with signals_left_to_ranks():
        run_ranks(
            nproc,
            _run,
            recipe,
            config,
            overrides,
            timeout=None,
            collective_timeout=cfg.dist.timeout_seconds,
            threads=share_of_cores(nproc),
        )


def configured(recipe: str, config: str | None, overrides: tuple[str, ...]) -> "ConfigContainer":
    """The recipe's configuration with the file's values and then the overrides applied.

    Raises:
        BridgeError: unknown recipe, or a file or override that does not fit it.
    """
    from megatron.bridge.training.overrides import apply_overrides, apply_yaml
    from megatron.bridge.training.recipe_registry import RECIPES

    cfg = RECIPES[recipe]()
    if config is not None:
        apply_yaml(cfg, config)
    apply_overrides(cfg, overrides)
    return cfg


def _run(recipe: str, config: str | None, overrides: tuple[str, ...]) -> None:
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    pretrain(configured(recipe, config, overrides), forward_step)
