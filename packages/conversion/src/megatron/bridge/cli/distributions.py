"""The distributions of this project: what each holds, and which commands come with it."""

from collections.abc import Mapping
from typing import NamedTuple


class Distribution(NamedTuple):
    """One of our distributions: the package it installs, what that is for, and commands it adds to the CLI."""

    module: str
    purpose: str
    commands: tuple[str, ...] = ()


OURS: Mapping[str, Distribution] = {
    "megatron-bridge-conversion": Distribution("megatron.bridge", "conversion, registries, platform and this CLI"),
    "megatron-bridge-models": Distribution(
        "megatron.bridge.models", "model providers, layer specs and families", ("models",)
    ),
    "megatron-bridge-peft": Distribution("megatron.bridge.peft", "parameter-efficient fine-tuning"),
    "megatron-bridge-data": Distribution("megatron.bridge.data", "datasets and preprocessing", ("data",)),
    "megatron-bridge-training": Distribution(
        "megatron.bridge.training", "the training loop", ("train", "config", "plan", "quickstart", "migrate")
    ),
    "megatron-bridge-mimo": Distribution("megatron.bridge.mimo", "several models trained as one", ("mimo",)),
    "megatron-bridge-recipes": Distribution("megatron.bridge.recipes", "importable training recipes", ("recipes",)),
}


def home_of_command(name: str) -> str | None:
    """The distribution of ours that would add the command `name`, or None."""
    return next((distribution for distribution, ours in OURS.items() if name in ours.commands), None)
