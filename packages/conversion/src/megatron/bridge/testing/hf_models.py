"""Tiny random transformers models for comparisons."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def random_model(config: "PretrainedConfig", seed: int = 0, spread: float = 0.1) -> "PreTrainedModel":
    """A model of `config` (of its architecture, else of its kind) in which no weight has a special value.

    Freshly made norms are all ones and biases all zeros, and a conversion could mix those up unseen.

    Args:
        config: the model's configuration; its dtype is used.
        seed: of every random number.
        spread: standard deviation of the noise added to every weight.
    """
    import torch

    from megatron.bridge.conversion.reference import model_class

    torch.manual_seed(seed)
    build = model_class(config)
    model: PreTrainedModel = build._from_config(config) if hasattr(build, "_from_config") else build.from_config(config)
    model.eval()
    if config.model_type == "mt5" or not getattr(config, "scale_decoder_outputs", True):
        # transformers makes these with tied output layers; in every published one it is a weight of its own.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
        saved = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point():
                buffer.add_(spread * torch.randn_like(buffer))
    return model


def save_random_model(config: "PretrainedConfig", folder: Path, seed: int = 0) -> "dict[str, torch.Tensor]":
    """Save `random_model(config, seed)` to `folder`; returns what the files hold."""
    from safetensors.torch import load_file

    random_model(config, seed).save_pretrained(folder)
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
