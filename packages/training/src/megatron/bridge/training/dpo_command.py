"""`megatron-bridge dpo`: from a model and a file of preferences to a model that follows them. Light until run."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from megatron.bridge.training.finetune_command import FinetuneCommand, start_tuning, tuning_options

if TYPE_CHECKING:
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.config import ConfigContainer


@click.command(name="dpo")
@click.option("--beta", default=0.1, show_default=True, help="How dearly going away from the reference model costs.")
@click.option("--format", "dataset_format", default="preference", show_default=True, help="What rows mean.")
@tuning_options
def dpo(**given: Any) -> None:
    """Tune a pretrained model on pairs of a better and a worse answer (direct preference optimization).

    The model that it starts from is the reference; with peft=lora that is the model without its adapter. A sample holds
    both answers, each with its prompt, in halves of --sequence-length. Everything else is as for `finetune`.
    """
    start_tuning(DPOCommand, given)


@dataclass(frozen=True, kw_only=True)
class DPOCommand(FinetuneCommand):
    """The command as it was given; called, it trains as one rank."""

    beta: float

    @property
    def name(self) -> str:
        return "dpo"

    @property
    def pairs(self) -> bool:
        return True

    def own_options(self) -> dict[str, Any]:
        return {"--beta": self.beta}

    def train(self, cfg: "ConfigContainer", callbacks: "list[Callback]") -> None:
        from megatron.bridge.training.dpo import dpo

        dpo(cfg, beta=self.beta, callbacks=callbacks)
