"""`megatron-bridge train`: a recipe, changed by a file and by overrides, on one or several ranks. Light until run."""

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

import click

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

# The longest time that poll(2) can wait for; a training run ends by itself.
_NO_LIMIT = 20 * 24 * 3600.0  # seconds


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
    from megatron.bridge.platform.launch import run_ranks

    if world_size() > 1:
        raise BridgeError(f"--nproc {nproc} starts ranks, but a launcher has started {world_size()} already; drop one")
    # In the parent: refusals come once, and the ranks are forked from a process that has imported everything.
    configured(recipe, config, overrides).validate(nproc)
    with _signals_left_to_the_ranks():
        run_ranks(nproc, _run_rank, recipe, config, overrides, timeout=_NO_LIMIT)


@contextlib.contextmanager
def _signals_left_to_the_ranks() -> Iterator[None]:
    """Wait for the ranks to end as they see fit: a terminal sends them Ctrl-C itself, SIGTERM is passed on to them."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            child.terminate()

    earlier = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


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


def _run_rank(recipe: str, config: str | None, overrides: tuple[str, ...]) -> None:
    # A forked rank has inherited its parent's handlers.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _run(recipe, config, overrides)
