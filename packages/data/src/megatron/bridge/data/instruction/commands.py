"""`megatron-bridge data inspect` and `data prepare`: instruction data before anything is trained. Light until run."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.data.datasets.sft_plan import SFTPlan

# The fields of `SFTDatasetConfig` that say what the tokens are, as options.
_OPTIONS = (
    click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE..."),
    click.option("--tokenizer", "-t", required=True, metavar="FOLDER", help="Hugging Face folder or hub id."),
    click.option("--format", "dataset_format", default="chat", show_default=True, help="What rows mean."),
    click.option(
        "--template",
        "prompt_template",
        default="chat_template",
        show_default=True,
        help="How conversations are written: the tokenizer's own, a name, or custom.",
    ),
    click.option("--custom-template", metavar="JINJA", help="With --template custom: a template, or a file with one."),
    click.option("--loss", default="assistant", show_default=True, help="assistant, last_turn, completion or all."),
    click.option("--sequence-length", type=click.IntRange(min=1), help="Tokens per sample."),
    click.option("--truncation", default="refuse", show_default=True, help="refuse, right, turns or drop."),
    click.option("--skip-bad-rows", default=0, show_default=True, help="Rows that may be unusable."),
    click.option("--trust-remote-code", is_flag=True, help="Let the tokenizer folder's own Python code run."),
)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@_with_options
@click.option("--rows", default=3, show_default=True, help="Conversations to show.")
def inspect(rows: int, **settings: Any) -> None:
    """Show instruction data as a model will see them.

    The first conversations with what is trained of them (green, or between « and » where the output is no terminal);
    the lengths of all; what is too long, what is unusable, and how full packs would be. The exit code is 1 when
    training would refuse the data.
    """
    from rich.console import Console

    from megatron.bridge.data.instruction.inspection import examine, show

    plan = _plan(settings)
    found = examine(plan, rows)
    show(found, plan, Console())
    if found.refusal is not None:
        raise BridgeError(found.refusal)


@click.command()
@_with_options
@click.option("--cache", required=True, metavar="FOLDER", help="Where the tokenized rows go: dataset.path_to_cache.")
def prepare(cache: str, **settings: Any) -> None:
    """Tokenize and pack instruction data before training.

    A run whose dataset section has the same settings, and path_to_cache=FOLDER, starts without reading the rows again.
    """
    import numpy as np

    from megatron.bridge.data.instruction.store import EncodedStore
    from megatron.bridge.data.packing import pack

    if settings["sequence_length"] is None:
        raise BridgeError("--sequence-length is needed: tokens per sample, as in training")
    plan = _plan(settings, cache)
    plan.prepare()
    for source in plan.sources:
        store = EncodedStore(source.folder)
        packs = pack(np.asarray(store.lengths) - 1, settings["sequence_length"])
        click.echo(
            f"{source.folder}: {len(store):,} conversations, {int(store.lengths.sum()):,} tokens; "
            f"{len(packs):,} packs, {packs.efficiency:.1%} full"
        )
        for bad in store.counts.bad:
            click.echo(f"skipped {bad}", err=True)


def _plan(settings: dict[str, Any], cache: str | None = None) -> "SFTPlan":
    from megatron.bridge.data.datasets.sft import SFTDatasetConfig
    from megatron.bridge.data.datasets.sft_plan import plan_sft
    from megatron.bridge.data.provider import DatasetBuildContext
    from megatron.bridge.data.tokenizers import TokenizerConfig, build_tokenizer

    model, trust = settings.pop("tokenizer"), settings.pop("trust_remote_code")
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=model, trust_remote_code=trust))
    files = [str(file) for file in settings.pop("files")]
    config = SFTDatasetConfig(data_paths=files, path_to_cache=cache, **settings)
    return plan_sft(config, DatasetBuildContext(tokenizer=tokenizer), try_rows=cache is not None)
