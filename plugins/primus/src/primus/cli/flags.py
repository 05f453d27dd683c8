"""The flags of `primus train`; those that are not given leave the file's values, and the defaults, in force."""

from collections.abc import Callable

import click

from megatron.bridge.errors import BridgeError, did_you_mean

FRAMEWORKS = ("megatron_bridge",)

_FLAGS = (
    click.option("--framework", default="megatron_bridge", show_default=True, help="Only this one is here."),
    click.option("--config", type=click.Path(), help="YAML file of sections."),
    click.option("--load", help="Megatron checkpoint to start from."),
    click.option("--save", help="Folder for checkpoints."),
    click.option("--data_path", help="Instruction data."),
    click.option("--dataset_format", help="alpaca, dolly, oasst, sharegpt, ..., or module:function."),
    click.option("--prompt_template", help="alpaca, chatml, llama2, ..., or custom."),
    click.option("--use_lora", is_flag=True, default=None, help="Train low-rank adapters only."),
    click.option("--lora_rank", type=int, help="Their rank."),
    click.option("--lora_alpha", type=float, help="Their scale, times the rank."),
    click.option("--convert_from_hf", is_flag=True, default=None, help="Start from a Hugging Face model."),
    click.option("--hf_model_name_or_path", help="That model."),
    click.option("--lr", type=float, help="Learning rate."),
    click.option("--train_iters", type=int, help="Optimizer steps."),
    click.option("--convert_to_hf", is_flag=True, default=None, help="Export the tuned model at the end."),
    click.option("--hf_save_path", help="Where to."),
)


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a click command the flags."""
    for flag in reversed(_FLAGS):
        command = flag(command)
    return command


def check_framework(name: str) -> None:
    """Refuse another framework than ours."""
    if name not in FRAMEWORKS:
        raise BridgeError(f"framework {name!r} is not here{did_you_mean(name, FRAMEWORKS)} (there is: {FRAMEWORKS[0]})")
