"""The model that a conversion is compared with: transformers' own class of the architecture, and its logits."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


def model_class(config: "PretrainedConfig") -> Any:
    """What builds the model that `config.architectures` names: the class itself, or else the causal language model."""
    import transformers

    names = list(config.architectures or ())
    named = getattr(transformers, names[0], None) if len(names) == 1 else None
    return named or transformers.AutoModelForCausalLM


def logits_of(model: Any, input_ids: "torch.Tensor") -> "torch.Tensor":
    """Logits of every position in float32: [batch, sequence, vocabulary], or [batch, sequence, labels] under a head.

    The decoder of an encoder-decoder reads the same tokens as its encoder. A sequence classifier gives out those of one
    token only, so its head is listened to.
    """
    import torch

    head = getattr(model, "score", None)
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(input_ids=input_ids, decoder_input_ids=input_ids).logits.float()
        if head is None:
            return model(input_ids).logits.float()
        heard: list[torch.Tensor] = []
        listener = head.register_forward_hook(lambda module, inputs, output: heard.append(output))
        for row in input_ids.split(1):  # without a token for padding there is one sequence at a time
            model(row)
        listener.remove()
        return torch.cat(heard).float()
