"""The command `megatron-bridge migrate`. Torch-free, but for `--check`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from megatron.bridge.training.migration.script import Launched


@click.group(name="migrate")
def migrate() -> None:
    """Bring settings from elsewhere."""


@migrate.command(name="megatron-lm", context_settings={"ignore_unknown_options": True})
@click.option("--script", type=click.Path(path_type=Path), help="Launch script to take the arguments from.")
@click.option("--tokenizer", metavar="FOLDER", help="Hugging Face folder of the tokenizer, in place of another kind.")
@click.option("--world-size", type=click.IntRange(min=1), help="Number of ranks, where no script says it.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="File to write; printed if not set.")
@click.option("--list", "listed", is_flag=True, help="Say what becomes of every argument, or of those named.")
@click.option("--check", is_flag=True, help="Build the configuration too, and say what of it could not run.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENT]...")
def megatron_lm(
    script: Path | None,
    tokenizer: str | None,
    world_size: int | None,
    output: Path | None,
    listed: bool,
    check: bool,
    words: tuple[str, ...],
) -> None:
    """Translate Megatron-LM's arguments (or those of a script with --script) into a configuration file.

    What is unknown or has no counterpart is refused by name. The arguments follow `--`; with --script they are the
    script's own.
    """
    from megatron.bridge.training.migration.arguments import ARGUMENTS, meaning
    from megatron.bridge.training.migration.script import Launched, launched_by
    from megatron.bridge.training.migration.translation import translate

    if listed:
        for name in [word.removeprefix("--") for word in words] or sorted(ARGUMENTS):
            click.echo(f"--{name}  {meaning(name)}")
        return
    launched = Launched(words) if script is None else launched_by(script, words)
    translation = translate(launched.words, world_size=world_size or launched.world_size, tokenizer=tokenizer)
    text = translation.to_yaml()
    if check:
        from megatron.bridge.training.migration.checking import expect_to_run

        expect_to_run(text, world_size or launched.world_size)
    if output is None:
        click.echo(text, nl=False)
        return
    _write(output, text)
    click.echo(f"{output} is written. Look at it, and train by it:")
    click.echo(f"  megatron-bridge config show --recipe megatron_lm --config {shlex.quote(str(output))}")
    click.echo(f"  {_training(output, launched, translation.run_folder)}")


def _write(output: Path, text: str) -> None:
    from megatron.bridge.errors import BridgeError

    if output.exists():
        raise BridgeError(f"{output} exists; choose another file")
    try:
        output.write_text(text, "utf-8")
    except OSError as error:
        raise BridgeError(f"{output} cannot be written: {error.strerror}; choose another file") from error


def _training(output: Path, launched: "Launched", run_folder: str | None) -> str:
    words = ["megatron-bridge", "train", "--recipe", "megatron_lm", "--config", str(output)]
    words += ["--run-folder", run_folder, "--resume"] if run_folder is not None else []
    words += ["--nproc", str(launched.ranks_per_node)] if launched.ranks_per_node else []
    words += ["--nodes", str(launched.nodes)] if (launched.nodes or 1) > 1 else []
    return shlex.join(words)
