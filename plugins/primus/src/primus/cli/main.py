"""`primus train ...`. Light until run."""

import sys
from typing import Any

import click

from megatron.bridge.errors import BridgeError
from primus.cli.flags import with_flags


@click.group()
def primus() -> None:
    """Post-train a language model."""


@primus.command()
@with_flags
def train(**flags: Any) -> None:
    """Tune a pretrained model: --config says how, flags come before it."""
    from primus.megatron_bridge.adapter import MegatronBridgeAdapter

    adapter = MegatronBridgeAdapter()
    adapter.trainer(adapter.arguments(flags)).train()


def main() -> None:
    """The command, with refusals in one line and exit code 1."""
    run(primus)


def run(command: click.Command) -> None:
    """Run `command` on the process's arguments."""
    try:
        command()
    except BridgeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
