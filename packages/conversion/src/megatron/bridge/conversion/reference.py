"""The model that a conversion is compared with: transformers' own class of the architecture, and its logits."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from megatron.bridge.conversion.probes import Probe


def model_class(config: "PretrainedConfig") -> Any:
    """What builds the model that `config.architectures` names: the class itself, or else the auto class of its kind."""
    import transformers

    names = list(config.architectures or ())
    named = getattr(transformers, names[0], None) if len(names) == 1 else None
    if named is not None:
        return named
    if hasattr(config, "vision_config"):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def logits_of(model: Any, probe: "Probe") -> "torch.Tensor":
    """Logits of every position in float32: [batch, sequence, vocabulary]."""
    import torch

    with torch.no_grad():
        if not probe.inputs:
            return model(probe.tokens).logits.float()
        rows = zip(probe.tokens.split(1), probe.inputs, strict=True)
        return torch.cat([model(row, **inputs).logits for row, inputs in rows]).float()
