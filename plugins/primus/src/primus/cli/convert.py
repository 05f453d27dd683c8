"""`python -m primus.cli.convert`: between Hugging Face folders and Megatron checkpoints, either way."""

from typing import Any

import click

from megatron.bridge.errors import BridgeError
from primus.cli.flags import check_framework
from primus.cli.main import run


@click.command()
@click.option("--framework", required=True)
@click.option("--load", help="Megatron checkpoint to export.")
@click.option("--hf_save_path", help="Hugging Face folder to write.")
@click.option("--convert_to_hf", is_flag=True, help="Export.")
@click.option("--hf_model_name_or_path", help="Hugging Face folder or hub id to import.")
@click.option("--save", help="Megatron checkpoint to write.")
@click.option("--convert_from_hf", is_flag=True, help="Import.")
def convert(framework: str, convert_to_hf: bool, convert_from_hf: bool, **paths: Any) -> None:
    """Convert a model: --convert_to_hf, or --convert_from_hf."""
    from megatron.bridge import AutoBridge

    check_framework(framework)
    if convert_to_hf == convert_from_hf:
        raise BridgeError("say which way: --convert_to_hf or --convert_from_hf")
    source, target = _ends(paths, ("load", "hf_save_path") if convert_to_hf else ("hf_model_name_or_path", "save"))
    if convert_to_hf:
        AutoBridge.from_megatron_checkpoint(source).export_ckpt(source, target)
    else:
        AutoBridge.import_ckpt(source, target)
    click.echo(target)


def _ends(paths: dict[str, str | None], names: tuple[str, str]) -> tuple[str, str]:
    source, target = (paths[name] for name in names)
    if source is None or target is None:
        raise BridgeError(f"this way needs --{names[0]} and --{names[1]}")
    return source, target


if __name__ == "__main__":
    run(convert)
