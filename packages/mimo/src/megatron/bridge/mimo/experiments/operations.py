"""Model FLOPs of a step: the language model's by formula, an encoder's counted on one item without computing it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron.bridge.training.flops import step_flops

if TYPE_CHECKING:
    from megatron.bridge.mimo.encoders import Encoder
    from megatron.bridge.mimo.provider import MimoProvider

# A forward pass, and one backward pass each for inputs and weights.
_PASSES = 3


def model_flops(provider: "MimoProvider", samples: int, items: Mapping[str, float]) -> float | None:
    """Operations of a step on all ranks together; None where some module's are not known.

    Args:
        provider: whose model it is.
        samples: of a step.
        items: of each modality, per sample.
    """
    total = step_flops(provider.language, samples)
    for name, encoder in provider.encoders.items():
        forward = item_flops(encoder, provider)
        if total is None or forward is None:
            return None
        total += samples * items.get(name, 0.0) * forward * (1 if encoder.frozen else _PASSES)
    return total


def item_flops(encoder: "Encoder", provider: "MimoProvider") -> float | None:
    """Operations of one item's forward pass; None where the encoder does not run on torch's device `meta`."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with torch.device("meta"):
            tower = encoder.build(provider.transformer_config(), initialized=False)
        inputs = {name: value.to("meta") for name, value in encoder.ghost().items()}
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            encoder.encode(tower, inputs)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    return float(counted.get_total_flops())
