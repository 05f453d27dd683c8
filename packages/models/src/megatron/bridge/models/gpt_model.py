"""Megatron-Core's GPT model, with a loss that the padded part of the vocabulary takes no part in."""

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor


class BridgeGPTModel(GPTModel):
    """`GPTModel` that knows its layer spec's name, and by `unpadded_vocab_size` how many of its output rows are real.

    Megatron pads the vocabulary to suit tensor parallelism. Logits of padded rows would add to every softmax, so that
    the same weights would have another loss at another layout; here they are masked.
    """

    unpadded_vocab_size: int | None = None
    layer_spec: str | None = None

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy per token.

        Args:
            labels: token ids [batch, sequence].
            logits: [sequence, batch, vocabulary / TP], this rank's share.

        Returns:
            Loss [batch, sequence].
        """
        if self.pg_collection.tp.size() == 1 and not self.config.cross_entropy_loss_fusion:
            return self._whole_vocabulary_loss(labels, logits)
        held = self.unpadded_vocab_size
        if held is not None and held < self.vocab_size:
            logits = logits.masked_fill(self._padded_columns(logits, held), torch.finfo(logits.dtype).min)
        return super().compute_language_model_loss(labels, logits)

    def _whole_vocabulary_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """The same loss by torch's own kernel, which is faster where no rank holds but a part of the vocabulary."""
        real = logits[..., : self.unpadded_vocab_size].float()
        losses = torch.nn.functional.cross_entropy(real.flatten(0, 1), labels.t().flatten(), reduction="none")
        return losses.view(logits.shape[:2]).t().contiguous()

    def _padded_columns(self, logits: Tensor, held: int) -> Tensor:
        share = logits.shape[-1]
        first = share * self.pg_collection.tp.rank()
        return torch.arange(first, first + share, device=logits.device) >= held
