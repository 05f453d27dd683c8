"""Megatron-Core's hybrid model: state-space, attention, MLP and expert layers in any order."""

from megatron.core.models.hybrid.hybrid_model import HybridModel

from megatron.bridge.models.gpt_model import BridgeLanguageModel


class BridgeHybridModel(BridgeLanguageModel, HybridModel):
    """`HybridModel` with the loss and the variants that all language models here share."""

    @property
    def max_position_embeddings(self) -> int:
        """Positions the model was made for."""
        return int(self.max_sequence_length)

    @max_position_embeddings.setter
    def max_position_embeddings(self, value: int) -> None:
        self.max_sequence_length = value
