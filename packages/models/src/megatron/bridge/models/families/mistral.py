"""Mistral 7B and its successors of the same layout (arXiv:2310.06825)."""

from collections.abc import Sequence

from megatron.bridge.models.families.dense import DenseBridge


class MistralBridge(DenseBridge):
    """`MistralForCausalLM`: every layer has the same attention window, or none has."""

    def windows(self) -> Sequence[int | None]:
        return [self.hf_config.sliding_window] * self.hf_config.num_hidden_layers
