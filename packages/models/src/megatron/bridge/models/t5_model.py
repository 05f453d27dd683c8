"""Megatron-Core's T5 model, computing what the published T5 does."""

from typing import Any

from megatron.core.models.T5 import T5Model
from torch import Tensor, nn

from megatron.bridge.models.gpt_model import BridgeLanguageModel


class BridgeT5Model(BridgeLanguageModel, T5Model):
    """`T5Model` with an output layer without a bias, whose input may be scaled, as in T5 1.0.

    Forward takes masks as Megatron-Core does: True where a query must not see a key, broadcast to
    `[batch, 1, queries, keys]`; the decoder's own causal mask is added.

    Args:
        scale_output: the decoder's output is multiplied by hidden_size ** -0.5 before the output layer.
        kwargs: as `T5Model`'s.
    """

    def __init__(self, *, scale_output: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.encoder_num_layers = self.encoder_config.num_layers
        if not self.post_process:
            return
        # Megatron-Core registers the output layer twice, and gives it a bias where it is tied to the embedding.
        del self.lm_head.output_layer
        object.__setattr__(self.lm_head, "output_layer", self.output_layer)
        self.output_layer.bias = None
        if scale_output:
            self.lm_head.register_forward_pre_hook(_Scale(self.config.hidden_size**-0.5), with_kwargs=True)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> Any:
        """As Megatron-Core's, without the output layer's empty extra state, which its GPT model leaves out too."""
        state = super().sharded_state_dict(prefix, *args, **kwargs)
        state.pop(f"{prefix}output_layer._extra_state", None)
        return state


class _Scale:
    """A forward pre-hook that multiplies a module's first input."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> Any:
        return (inputs[0] * self.factor, *inputs[1:]), named
