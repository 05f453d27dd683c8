"""The model that a conversion is compared with: transformers' own class of the architecture, and its logits."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


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


def logits_of(
    model: Any, input_ids: "torch.Tensor", inputs: "Sequence[Mapping[str, torch.Tensor]]" = ()
) -> "torch.Tensor":
    """Logits of every position in float32: [batch, sequence, vocabulary], or [batch, sequence, labels] under a head.

    The decoder of an encoder-decoder reads the same tokens as its encoder. A sequence classifier gives out those of one
    token only, so its head is listened to.

    Args:
        model: of transformers.
        input_ids: token ids [batch, sequence].
        inputs: per row, what the model takes besides (images).
    """
    import torch

    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(input_ids=input_ids, decoder_input_ids=input_ids).logits.float()
        if inputs:
            rows = zip(input_ids.split(1), inputs, strict=True)
            return torch.cat([model(row, **own).logits for row, own in rows]).float()
        if getattr(model, "score", None) is None:
            return model(input_ids).logits.float()
        return _of_the_head(model, input_ids)


def _of_the_head(model: Any, input_ids: "torch.Tensor") -> "torch.Tensor":
    import torch

    heard: list[torch.Tensor] = []
    listener = model.score.register_forward_hook(lambda module, inputs, output: heard.append(output))
    for row in input_ids.split(1):  # without a token for padding there is one sequence at a time
        model(row)
    listener.remove()
    return torch.cat(heard).float()
