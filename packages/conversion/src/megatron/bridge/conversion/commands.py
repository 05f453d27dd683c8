"""`megatron-bridge convert import|export|diff`, `megatron-bridge inspect` and `megatron-bridge verify`."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from megatron.bridge.conversion.layout_options import layout_options, ranks_of


def offline_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options for converting without a model."""
    options = (
        click.option("--offline", is_flag=True, help="Convert from files to files, without a model; can be resumed."),
        click.option("--workers", type=click.IntRange(1), help="Files written at the same time, with --offline."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group()
def convert() -> None:
    """Convert between Hugging Face folders and Megatron checkpoints."""


@convert.command("import")
@click.argument("hf_model")
@click.argument("megatron_path", type=click.Path(path_type=Path))
@layout_options
@offline_options
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run the configuration code that the model ships.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is there.")
def import_command(
    hf_model: str,
    megatron_path: Path,
    layout: dict[str, int],
    offline: bool,
    workers: int | None,
    **options: Any,
) -> None:
    """Convert HF_MODEL (folder or hub id) to a Megatron checkpoint at MEGATRON_PATH.

    The checkpoint loads at any layout; --tp, --pp and --ep only spread the work over processes of this machine,
    --workers over threads.
    """
    _refuse_contradiction(offline, workers, layout)
    _refuse_existing_checkpoint(megatron_path, options["overwrite"])
    started = time.perf_counter()
    if offline:
        from megatron.bridge.conversion.offline import import_checkpoint

        import_checkpoint(hf_model, megatron_path, workers=workers or 1, **options)
    else:
        _run(ranks_of(layout), _import, hf_model, megatron_path, options | layout)
    _say(f"{hf_model} -> {megatron_path} in {time.perf_counter() - started:.1f} s")


@convert.command("export")
@click.argument("megatron_path", type=click.Path(path_type=Path))
@click.argument("hf_path", type=click.Path(path_type=Path))
@layout_options
@offline_options
@click.option(
    "--hf-model",
    "--hf-config",
    "hf_model",
    help="Which Hugging Face model it is (a folder with its config.json will do), for checkpoints that do not say.",
)
@click.option("--quantization", help="Write linear layers in few bits: fp8-block. The default is full precision.")
@click.option("--overwrite", is_flag=True, help="Replace a Hugging Face folder that is there.")
def export_command(
    megatron_path: Path,
    hf_path: Path,
    layout: dict[str, int],
    offline: bool,
    workers: int | None,
    hf_model: str | None,
    **options: Any,
) -> None:
    """Convert the Megatron checkpoint at MEGATRON_PATH to a complete Hugging Face folder HF_PATH."""
    _refuse_contradiction(offline, workers, layout)
    started = time.perf_counter()
    if offline:
        from megatron.bridge.conversion.offline import export_checkpoint

        export_checkpoint(megatron_path, hf_path, hf_model=hf_model, workers=workers or 1, **options)
    else:
        _run(ranks_of(layout), _export, megatron_path, hf_path, hf_model, options | layout)
    _say(f"{megatron_path} -> {hf_path} in {time.perf_counter() - started:.1f} s")


@convert.command("diff")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def diff_command(first: Path, second: Path, as_json: bool) -> None:
    """Compare two models, each a Hugging Face folder or a Megatron checkpoint: names, shapes, dtypes, values.

    Exits with 1 when they differ.
    """
    from megatron.bridge.conversion.diff import as_text, diff

    result = diff(first, second)
    click.echo(json.dumps(result.to_json(), indent=2) if as_json else as_text(result))
    if not result.same:
        click.get_current_context().exit(1)


@click.command()
@click.argument("model")
@layout_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one entry per weight.")
@click.option("--digests", is_flag=True, help="Only compare the files of a Megatron checkpoint with their digests.")
@click.option("--trust-remote-code", is_flag=True, help="Run the configuration code that the model ships.")
def inspect(model: str, as_json: bool, digests: bool, trust_remote_code: bool, layout: dict[str, int]) -> None:
    """Show what becomes what, and which ranks of a layout hold it.

    MODEL is a Hugging Face folder, a hub id or a Megatron checkpoint.
    """
    from megatron.bridge.conversion import inspection
    from megatron.bridge.conversion.integrity import refuse_changed

    if digests:
        click.echo(f"{refuse_changed(Path(model))} files are as they were written")
        return
    rows = inspection.inspect_plan(model, trust_remote_code=trust_remote_code, layout=layout)
    click.echo(json.dumps(inspection.as_json(rows), indent=2) if as_json else inspection.as_table(rows))
    if not as_json:
        click.echo(f"{len(rows)} Megatron weights, {sum(row.nbytes for row in rows) / 1e9:.3f} GB")


@click.command()
@click.argument("hf_folder", type=click.Path(path_type=Path))
@click.option("--megatron", "megatron_path", type=click.Path(path_type=Path), help="Checkpoint to compare with.")
@layout_options
@click.option("--layer-spec", help="Layer spec to build the Megatron side with.")
@click.option("--certificate", type=click.Path(path_type=Path), help="Write the result to this JSON file.")
def verify(
    hf_folder: Path,
    megatron_path: Path | None,
    layout: dict[str, int],
    layer_spec: str | None,
    certificate: Path | None,
) -> None:
    """Prove that HF_FOLDER and its Megatron counterpart are the same: every weight bitwise, and the logits.

    Exits with 1 when they differ.
    """
    result = _run(ranks_of(layout), _verify, hf_folder, megatron_path, layer_spec, layout)
    if result is None:  # another rank than the one that speaks
        return
    if certificate is not None:
        certificate.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    same = result.weights_compared - len(result.weights_differing)
    _say(f"weights: {same} of {result.weights_compared} bitwise equal, {result.bytes_compared:,} bytes")
    _say(f"logits:  largest difference {result.logit_difference:.2e} (allowed {result.logit_tolerance:.0e})")
    result.refuse_failure()


def _run(ranks: int, function: Callable[..., Any], *args: Any) -> Any:
    from megatron.bridge.platform.engine import import_engine
    from megatron.bridge.platform.launch import run_layout

    import_engine()
    return run_layout(ranks, function, *args)


def _say(text: str) -> None:
    from megatron.bridge.platform import is_rank_zero

    if is_rank_zero():
        click.echo(text)


def _import(hf_model: str, megatron_path: Path, options: dict[str, Any]) -> None:
    from megatron.bridge.conversion.auto_bridge import AutoBridge

    AutoBridge.import_ckpt(hf_model, megatron_path, **options)


def _export(megatron_path: Path, hf_path: Path, hf_model: str | None, options: dict[str, Any]) -> None:
    from megatron.bridge.conversion.auto_bridge import AutoBridge

    if hf_model is None:
        bridge = AutoBridge.from_megatron_checkpoint(megatron_path)
    else:
        bridge = AutoBridge.from_hf_pretrained(hf_model)
    bridge.export_ckpt(megatron_path, hf_path, show_progress=True, **options)


def _verify(hf_folder: Path, megatron_path: Path | None, layer_spec: str | None, layout: dict[str, Any]) -> Any:
    from megatron.bridge.conversion.verify import verify as compare
    from megatron.bridge.platform import is_rank_zero

    result = compare(hf_folder, megatron_path=megatron_path, layer_spec=layer_spec, **layout)
    return result if is_rank_zero() else None


def _refuse_contradiction(offline: bool, workers: int | None, layout: dict[str, int]) -> None:
    if offline and any(size > 1 for size in layout.values()):
        raise click.UsageError(
            "--offline uses no ranks (the result loads at any layout): leave out --tp, --pp, --vpp, --ep and --etp"
        )
    if workers and not offline:
        raise click.UsageError("--workers goes with --offline; without it, --tp and --pp spread the work")


def _refuse_existing_checkpoint(path: Path, overwrite: bool) -> None:
    """Seconds before the conversion would find it out."""
    from megatron.bridge.conversion.checkpoint_layout import CheckpointError, iteration_folder

    if iteration_folder(path, 0).exists() and not overwrite:
        raise CheckpointError(f"{path} holds a converted checkpoint already; choose another path, or pass --overwrite")
