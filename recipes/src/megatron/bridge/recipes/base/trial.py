"""Two steps of a recipe with a tiny model: whether the whole way works on this machine."""

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.recipes.base.building import build, hf_config
from megatron.bridge.recipes.base.description import Description
from megatron.bridge.recipes.base.shrunk import shrunk

if TYPE_CHECKING:
    from megatron.bridge.training.state import TrainResult


def trial(description: Description) -> "TrainResult":
    """Train the tiny variant of what is described, on mock data; tuning starts from random weights in a file.

    Raises:
        BridgeError: what the recipe itself would be refused for.
    """
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    small = shrunk(description)
    if small.task == "pretrain":
        return pretrain(build(small), forward_step)
    if "num_nextn_predict_layers" in small.hf_config:
        # transformers writes no prediction layers; published files have them.
        small = dataclasses.replace(small, hf_config={**small.hf_config, "num_nextn_predict_layers": 0})
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        _save_random_weights(small, weights)
        return finetune(build(small.but("ours: for the trial", {"checkpoint.pretrained_checkpoint": str(weights)})))


def _save_random_weights(description: Description, folder: Path) -> None:
    import torch

    from megatron.bridge.testing import save_random_model

    config = hf_config(description)
    config.dtype = getattr(torch, description.value("model.params_dtype"))
    save_random_model(config, folder)
