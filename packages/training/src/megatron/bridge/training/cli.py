"""`megatron-bridge train`: a recipe, changed by a file and by overrides, on one or several ranks. Light until run."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from megatron.bridge.training.launching.start import Launching, launching_options, start

if TYPE_CHECKING:
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.config import ConfigContainer


@click.command(name="train", context_settings={"ignore_unknown_options": False})
@click.option("--recipe", required=True, help="Name of a recipe; `megatron-bridge plugins` lists them.")
@click.option("--config", type=click.Path(), help="YAML file of sections, e.g. a checkpoint's run_config.yaml.")
@click.option("--run-folder", type=click.Path(), help="Folder for all that the run writes.")
@click.option("--forward-step", metavar="MODULE:NAME", help="A forward step of your own, not an installed one.")
@click.option("--callback", "callbacks", multiple=True, metavar="MODULE:NAME", help="A callback; may be repeated.")
@click.option("--resume", is_flag=True, help="Go on with the run in --run-folder; begin it where there is none.")
@launching_options
@click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")
def train(**given: Any) -> None:
    """Train by a recipe.

    Overrides change single fields of it: train.train_iters=10 model.tensor_model_parallel_size=2. Under torchrun or
    srun the ranks are theirs; --nproc starts ranks here, --launcher elsewhere. Ctrl-C saves a checkpoint, where there
    is a folder for it, and says how to resume.
    """
    launching = {name: given.pop(name) for name in Launching.__dataclass_fields__}
    start(TrainCommand(**given), Launching(**launching))


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """The command as it was given; called, it trains as one rank."""

    recipe: str
    config: str | None
    overrides: tuple[str, ...]
    run_folder: str | None = None
    resume: bool = False
    forward_step: str | None = None
    callbacks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the job in a queue."""
        return self.recipe

    def arguments(self, *, resume: bool) -> tuple[str, ...]:
        """The words after `megatron-bridge` for one rank."""
        words = ["train", "--recipe", self.recipe]
        words += ["--config", self.config] if self.config is not None else []
        words += ["--run-folder", self.run_folder] if self.run_folder is not None else []
        words += ["--forward-step", self.forward_step] if self.forward_step is not None else []
        words += [word for name in self.callbacks for word in ("--callback", name)]
        words += ["--resume"] if resume else []
        return (*words, *self.overrides)

    def configured(self) -> "ConfigContainer":
        """What it is to run."""
        from megatron.bridge.training.run_folder import use_run_folder

        cfg = configured(self.recipe, self.config, self.overrides)
        self._own_code()  # refused here, before ranks are started
        if self.run_folder is not None:
            use_run_folder(cfg, self.run_folder, resume=self.resume)
        return cfg

    def __call__(self) -> None:
        """Train as one rank."""
        from megatron.bridge.training.run_folder import recorded

        if self.run_folder is None:
            self._train([])
            return
        with recorded(self.run_folder, ["megatron-bridge", *self.arguments(resume=self.resume)]) as record:
            self._train([record])

    def _train(self, callbacks: "list[Callback]") -> None:
        from megatron.bridge.training.pretrain import pretrain

        cfg, (forward_step, own_callbacks) = self.configured(), self._own_code()
        pretrain(cfg, forward_step, [*callbacks, *own_callbacks])

    def _own_code(self) -> "tuple[Any, list[Callback]]":
        """The forward step, None where the configuration names it, and the callbacks."""
        from megatron.bridge.training.own_code import own, own_callback

        step = None if self.forward_step is None else own(self.forward_step, "--forward-step")
        return step, [own_callback(name) for name in self.callbacks]


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
