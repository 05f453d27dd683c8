"""`megatron-bridge data ...`."""

import time
from pathlib import Path

import click

from megatron.bridge.data.instruction.commands import inspect, prepare
from megatron.bridge.data.preprocess.sources import DOCUMENT_KINDS


@click.group()
def data() -> None:
    """Prepare training data, and look at them."""


data.add_command(inspect)
data.add_command(prepare)


@data.command()
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="INPUT...")
@click.option("--output", "-o", required=True, metavar="PREFIX", help="Write PREFIX.bin, PREFIX.idx and PREFIX.json.")
@click.option("--tokenizer", "-t", required=True, metavar="FOLDER", help="Hugging Face folder or hub id.")
@click.option("--glob", "globs", multiple=True, help="Files of a folder to read, e.g. '**/*.py'; may be repeated.")
@click.option("--json-key", default="text", show_default=True, help="Key of the text in JSONL, or its column.")
@click.option(
    "--document",
    default="file",
    show_default=True,
    type=click.Choice(DOCUMENT_KINDS),
    help="What a document of a text file is.",
)
@click.option(
    "--workers", default=1, show_default=True, type=int, help="Processes that tokenize; one already uses every core."
)
@click.option("--overwrite", is_flag=True, help="Replace existing output.")
@click.option("--trust-remote-code", is_flag=True, help="Let the tokenizer folder's own Python code run.")
def preprocess(
    inputs: tuple[Path, ...],
    output: str,
    tokenizer: str,
    globs: tuple[str, ...],
    json_key: str,
    document: str,
    workers: int,
    overwrite: bool,
    trust_remote_code: bool,
) -> None:
    """Tokenize text for pretraining.

    INPUT is a text file, a .jsonl file (either also as .gz), a .parquet file, a folder of them, or a Hugging Face
    dataset on disk.
    """
    from megatron.bridge.data.preprocess.corpus import preprocess_corpus
    from megatron.bridge.data.preprocess.progress import progress_bar

    started = time.perf_counter()
    with progress_bar() as report:
        made = preprocess_corpus(
            inputs,
            output,
            tokenizer,
            globs=globs,
            json_key=json_key,
            document=document,
            workers=workers,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            report=report,
        )
    seconds = time.perf_counter() - started
    skipped = f" ({made.skipped_empty:,} empty ones left out)" if made.skipped_empty else ""
    click.echo(
        f"{output}.bin: {made.tokens:,} tokens in {made.documents:,} documents{skipped} "
        f"from {made.files:,} files in {seconds:.1f} s ({made.tokens / seconds:,.0f} tokens/s)"
    )
