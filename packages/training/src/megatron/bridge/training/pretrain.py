"""`pretrain`: one call from a configuration to a trained model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.state import TrainResult


def pretrain(cfg: "ConfigContainer", forward_step: Any = None, callbacks: "Sequence[Callback]" = ()) -> "TrainResult":
    """Train `cfg.model` on `cfg.dataset`. Works as `python script.py`, and under torchrun or srun with several ranks.

    What the caller had set up (torch.distributed, Megatron's process groups) stays; what this call set up is taken down
    at its end.

    Args:
        cfg: the run; validated as a whole before anything is built.
        forward_step: `(run, data_iterator, model) -> (output, loss function)`, e.g. `gpt_step.forward_step`; None for
            the one that `cfg.train.forward_step` names.
        callbacks: called at the loop's fixed moments, on every rank.

    Raises:
        BridgeError: the configuration, the data or a checkpoint is refused, or the loss became NaN.
    """
    from megatron.bridge.training.forward_steps import FORWARD_STEPS
    from megatron.bridge.training.setup import distributed, setup
    from megatron.bridge.training.train import train

    name = cfg.train.forward_step
    if forward_step is None and name is None:
        raise BridgeError("train.forward_step is null, and pretrain() was given no function; name one, or give one")
    with distributed(cfg):
        run = setup(cfg, callbacks)
        return train(run, forward_step or FORWARD_STEPS[str(name)])
