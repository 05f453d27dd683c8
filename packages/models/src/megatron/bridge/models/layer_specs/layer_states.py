"""What heterogeneous layers hand on beside the hidden states: within a pipeline stage, and to the next one."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.bridge.models.heterogeneous_layers import HeterogeneousLayers


class LayerStates:
    """Inputs of single layers, and keys and values that later layers share. Every forward pass fills it anew.

    Args:
        layers: how the layers differ.
        config: of the model.
        first: the first layer of this pipeline stage.

    Attributes:
        inputs: `[sequence, batch, layers from the first of this stage on * input size]`, divided along the sequence as
            hidden states are.
        keys_values: by layer, `[sequence, batch, this rank's heads, size]` each, before the rotation.
    """

    def __init__(self, layers: HeterogeneousLayers, config: TransformerConfig, first: int) -> None:
        self.layers, self.config, self.first = layers, config, first
        self.inputs: Tensor | None = None
        self.keys_values: dict[int, tuple[Tensor, Tensor]] = {}

    def clear(self) -> None:
        """Let go of the tensors."""
        self.inputs, self.keys_values = None, {}

    def input_of(self, layer: int) -> Tensor:
        """`[sequence, batch, input size]`."""
        return self._inputs_from(layer)[..., : self.layers.input_size]

    def _inputs_from(self, layer: int) -> Tensor:
        if self.inputs is None:
            raise RuntimeError("the layers' inputs have not been made or received in this forward pass")
        return self.inputs[..., (layer - self.first) * self.layers.input_size :]

    def packed(self, hidden: Tensor, layer: int) -> Tensor:
        """Hidden states for a stage that begins at `layer`, with all that it and later stages need beside them."""
        parts = [hidden]
        if self.layers.input_size:
            parts.append(self._inputs_from(layer))
        for source in self.layers.sources_across(layer):
            parts += [self._as_channels(states) for states in self.keys_values[source]]
        # The tensor is sent and then freed, so it must be no view.
        return hidden if len(parts) == 1 else torch.cat([part.to(hidden.dtype) for part in parts], -1)

    def unpack(self, packed: Tensor) -> Tensor:
        """The hidden states of what the stage before has packed; the rest is kept here."""
        self.clear()
        sources = self.layers.sources_across(self.first)
        inputs = (len(self.layers.sizes) - self.first) * self.layers.input_size
        widths = [width for source in sources for width in [self._heads(source)[0] * self._heads(source)[1]] * 2]
        widths = [width * self._sequence_parts for width in widths]
        hidden, given, *states = packed.split([self.config.hidden_size, inputs, *widths], -1)
        self.inputs = given.to(self.config.params_dtype)
        for source, key, value in zip(sources, states[::2], states[1::2], strict=True):
            heads = self._heads(source)
            self.keys_values[source] = self._as_heads(key, heads), self._as_heads(value, heads)
        return hidden

    def _heads(self, layer: int) -> tuple[int, int]:
        """This rank's key/value heads of a layer, and their size."""
        groups = self.layers.size(layer, "num_query_groups", self.config)
        own = max(groups // self.config.tensor_model_parallel_size, 1)
        return own, self.layers.size(layer, "kv_channels", self.config)

    @property
    def _sequence_parts(self) -> int:
        """Over how many ranks hidden states are divided along the sequence; keys and values never are."""
        return self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1

    def _as_channels(self, states: Tensor) -> Tensor:
        """`[sequence, batch, heads, size]` as `[sequence / parts, batch, channels]`."""
        parts = states.flatten(2).unflatten(0, (self._sequence_parts, -1))
        return parts.permute(1, 2, 0, 3).flatten(2)

    def _as_heads(self, channels: Tensor, heads: tuple[int, int]) -> Tensor:
        """The inverse of `_as_channels`."""
        parts = channels.to(self.config.params_dtype).unflatten(2, (self._sequence_parts, -1))
        return parts.permute(2, 0, 1, 3).flatten(0, 1).unflatten(2, heads)
