"""`pretrain`: one call from a configuration to a trained model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.state import TrainResult


def pretrain(cfg: "ConfigContainer", forward_step: Any, callbacks: "Sequence[Callback]" = ()) -> "TrainResult":
    """Train `cfg.model` on `cfg.dataset`. Works as `python script.py`, and under torchrun or srun with several ranks.

    What the caller had set up (torch.distributed, Megatron's process groups) stays; what this call set up is taken down
    at its end.

    Args:
        cfg: the run; validated as a whole before anything is built.
        forward_step: `(run, data_iterator, model) -> (output, loss function)`, e.g. `gpt_step.forward_step`.
        callbacks: called at the loop's fixed moments, on every rank.

    Raises:
        BridgeError: the configuration, the data or a checkpoint is refused, or the loss became NaN.
    """
    from megatron.bridge.training.setup import distributed, setup
    from megatron.bridge.training.train import train

    with distributed(cfg):
        return train(setup(cfg, callbacks), forward_step)
