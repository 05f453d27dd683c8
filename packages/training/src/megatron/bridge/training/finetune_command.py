"""`megatron-bridge finetune`: from a model and a file of instructions to a tuned model. Light until run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from megatron.bridge.training.launching.start import Launching, launching_options, start

if TYPE_CHECKING:
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.config import ConfigContainer

_COUNT = click.IntRange(min=1)
_OPTIONS = (
    click.option("--model", required=True, help="Hugging Face folder or hub id, or a Megatron checkpoint."),
    click.option("--data", required=True, multiple=True, help="File of rows, or a dataset on disk; may be repeated."),
    click.option("--valid-data", multiple=True, help="To evaluate on; otherwise one row of twenty is kept back."),
    click.option("--template", default="chat_template", show_default=True, help="How conversations are written."),
    click.option("--sequence-length", default=2048, show_default=True, type=_COUNT, help="Tokens a sample."),
    click.option("--skip-bad-rows", default=0, type=click.IntRange(min=0), help="Rows that may be unusable."),
    click.option(
        "--epochs", default=3.0, show_default=True, help="Passes over the data; train.train_iters goes first."
    ),
    click.option("--patience", type=_COUNT, help="Stop after so many evaluations without a lower loss."),
    click.option("--sample", "samples", multiple=True, metavar="PROMPT", help="Answer it after each evaluation."),
    click.option("--export", metavar="FOLDER", help="Write the best weights as a Hugging Face folder at the end."),
    click.option("--export-adapter", metavar="FOLDER", help="Write the best adapter for Hugging Face peft at the end."),
    click.option("--trust-remote-code", is_flag=True, help="Let the model folder's own Python code run."),
    click.option("--config", type=click.Path(), help="YAML file of sections, e.g. a checkpoint's run_config.yaml."),
    click.option("--run-folder", required=True, type=click.Path(), help="Folder for all that the run writes."),
    click.option("--resume", is_flag=True, help="Go on with the run in --run-folder; begin it where there is none."),
    click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]..."),
)


def tuning_options[F: Callable[..., Any]](command: F) -> F:
    """Give a click command the options of `FinetuneCommand`, but for `--format`, and those of launching."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return launching_options(command)


@click.command(name="finetune")
@click.option("--format", "dataset_format", default="chat", show_default=True, help="What rows mean.")
@tuning_options
def finetune(**given: Any) -> None:
    """Tune a pretrained model on instructions.

    The best weights by validation loss are kept in checkpoints/best of the run folder. Overrides change single fields:
    optimizer.lr=2e-5 train.global_batch_size=32 dataset.packing=false model.tensor_model_parallel_size=2.
    """
    start_tuning(FinetuneCommand, given)


def start_tuning(kind: "type[FinetuneCommand]", given: dict[str, Any]) -> None:
    """Launch the command that the options of `tuning_options`, and perhaps further ones, describe."""
    launching = {name: given.pop(name) for name in Launching.__dataclass_fields__}
    start(kind(**given), Launching(**launching))


@dataclass(frozen=True, kw_only=True)
class FinetuneCommand:
    """The command as it was given; called, it trains as one rank."""

    model: str
    data: tuple[str, ...]
    valid_data: tuple[str, ...]
    dataset_format: str
    template: str
    sequence_length: int
    skip_bad_rows: int
    epochs: float
    patience: int | None
    samples: tuple[str, ...]
    export: str | None
    export_adapter: str | None
    trust_remote_code: bool
    config: str | None
    run_folder: str
    resume: bool
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the command, and of the job in a queue."""
        return "finetune"

    @property
    def pairs(self) -> bool:
        """Whether rows hold two answers."""
        return False

    def arguments(self, *, resume: bool) -> tuple[str, ...]:
        """The words after `megatron-bridge` for one rank."""
        options: dict[str, Any] = {
            "--model": self.model,
            "--data": self.data,
            "--valid-data": self.valid_data,
            "--format": self.dataset_format,
            "--template": self.template,
            "--sequence-length": self.sequence_length,
            "--skip-bad-rows": self.skip_bad_rows,
            "--epochs": self.epochs,
            "--patience": self.patience,
            "--sample": self.samples,
            "--export": self.export,
            "--export-adapter": self.export_adapter,
            "--config": self.config,
            "--run-folder": self.run_folder,
            **self.own_options(),
        }
        words = [self.name]
        for option, value in options.items():
            for each in value if isinstance(value, tuple) else () if value is None else (value,):
                words += [option, str(each)]
        words += ["--trust-remote-code"] if self.trust_remote_code else []
        words += ["--resume"] if resume else []
        return (*words, *self.overrides)

    def own_options(self) -> dict[str, Any]:
        """What a command has besides the options that all of them have."""
        return {}

    def configured(self) -> "ConfigContainer":
        """What it is to run."""
        from megatron.bridge.training.finetune import finetune_config, plan_length
        from megatron.bridge.training.overrides import apply_overrides, apply_yaml
        from megatron.bridge.training.run_folder import use_run_folder

        cfg = finetune_config(
            self.model,
            self.data,
            valid_data=self.valid_data,
            sequence_length=self.sequence_length,
            trust_remote_code=self.trust_remote_code,
            dataset_format=self.dataset_format,
            prompt_template=self.template,
            skip_bad_rows=self.skip_bad_rows,
            pairs=self.pairs,
        )
        if self.config is not None:
            apply_yaml(cfg, self.config)
        apply_overrides(cfg, self.overrides)
        plan_length(cfg, self.epochs)
        use_run_folder(cfg, self.run_folder, resume=self.resume)
        return cfg

    def callbacks(self) -> "list[Callback]":
        """What is done beside the loop. The order matters: what is exported is the best."""
        from megatron.bridge.training.best import KeepBest
        from megatron.bridge.training.hf_export import ExportHF
        from megatron.bridge.training.samples import GenerationSamples

        found: list[Callback] = [KeepBest(self.patience)]
        found += [GenerationSamples(self.samples)] if self.samples else []
        found += [ExportHF(self.export)] if self.export is not None else []
        found += [ExportHF(self.export_adapter, adapter=True)] if self.export_adapter is not None else []
        return found

    def __call__(self) -> None:
        """Train as one rank."""
        from megatron.bridge.training.run_folder import recorded

        with recorded(self.run_folder, ["megatron-bridge", *self.arguments(resume=self.resume)]) as record:
            self.train(self.configured(), [record, *self.callbacks()])

    def train(self, cfg: "ConfigContainer", callbacks: "list[Callback]") -> None:
        """What the command is for."""
        from megatron.bridge.training.finetune import finetune

        finetune(cfg, callbacks=callbacks)
