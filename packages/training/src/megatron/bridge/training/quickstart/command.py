"""`megatron-bridge quickstart`."""

from pathlib import Path

import click


@click.command()
@click.option(
    "--hf", type=click.Path(path_type=Path), help="Hugging Face folder to start from; default: a small Llama."
)
@click.option(
    "--text", type=click.Path(path_type=Path), help="Text file or folder; default: Python's standard library."
)
@click.option("--tp", default=2, show_default=True, type=click.IntRange(1), help="Tensor-parallel ranks.")
@click.option("--pp", default=1, show_default=True, type=click.IntRange(1), help="Pipeline stages.")
@click.option("--steps", default=400, show_default=True, type=click.IntRange(2), help="Training steps.")
@click.option("--seq-length", default=128, show_default=True, type=click.IntRange(8), help="Tokens per sequence.")
@click.option("--batch", default=16, show_default=True, type=click.IntRange(1), help="Sequences per step.")
@click.option("--lr", default=5e-3, show_default=True, type=float, help="Highest learning rate.")
@click.option(
    "--work",
    default=Path("quickstart"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for all of it.",
)
@click.option("--fresh", is_flag=True, help="Remove what an earlier run left in the folder.")
def quickstart(work: Path, fresh: bool, **choices: object) -> None:
    """Convert, train in parallel, resume, export, and prove it with transformers.

    Needs no network: without --hf it makes a small Llama with a tokenizer trained on the text. An interrupted run goes
    on where it stopped when the same command is given again.
    """
    from megatron.bridge.training.quickstart.journal import Journal, QuickstartOptions
    from megatron.bridge.training.quickstart.run import run

    options = QuickstartOptions(**choices)  # type: ignore[arg-type]
    run(Journal.open(work, options, fresh=fresh))
