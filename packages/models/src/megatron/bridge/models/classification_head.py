"""Classification and reward heads in place of the vocabulary's output layer."""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.gpt_model import BridgeGPTModel


class ClassificationHead(nn.Module):
    """A projection of every token's last hidden state to labels, whole on every tensor-parallel rank.

    Args:
        config: of the model.
        labels: outputs per token; a reward or value head has one.
        bias: whether the projection has a bias.
        dropout: before the projection.
    """

    def __init__(self, config: TransformerConfig, labels: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(labels, config.hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(labels, dtype=config.params_dtype)) if bias else None
        self.dropout = dropout
        self.sequence_parallel = config.sequence_parallel
        if config.init_method is not None:  # small enough to be initialised where weights are loaded, too
            config.init_method(self.weight)
        for parameter in self.parameters():
            # Each rank then sees some of the tokens; Megatron-Core adds up the gradients of what is marked so.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """Logits `[sequence, batch, labels]` of `[sequence, batch, hidden]` (of this rank's tokens under SP)."""
        del weight, runtime_gather_output  # part of Megatron-Core's contract for output layers
        logits = nn.functional.linear(self._dropped(hidden), self.weight, self.bias)
        if self.sequence_parallel:
            logits = gather_from_sequence_parallel_region(logits, tensor_parallel_output_grad=False)
        return logits, None

    def _dropped(self, hidden: Tensor) -> Tensor:
        if not self.training or self.dropout == 0.0:
            return hidden
        if not self.sequence_parallel:
            return nn.functional.dropout(hidden, self.dropout)
        with get_cuda_rng_tracker().fork():  # ranks hold different tokens
            return nn.functional.dropout(hidden, self.dropout)


class HeadedGPTModel(BridgeGPTModel):
    """A GPT decoder whose output layer is a `ClassificationHead`.

    Without labels the forward pass gives every token's logits, `[batch, sequence, labels]`, the same on every
    tensor-parallel rank; `last_token_logits` picks a sequence's. With labels `[batch, sequence]` it gives their cross
    entropy per token.

    Args:
        num_labels, head_bias, head_dropout, pad_token_id: as in the provider.
        kwargs: as `GPTModel`'s.
    """

    def __init__(
        self, *, num_labels: int, head_bias: bool, head_dropout: float, pad_token_id: int | None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.num_labels, self.pad_token_id = num_labels, pad_token_id
        self.parallel_output = False  # logits are whole on every rank
        if self.post_process:
            self.output_layer = ClassificationHead(self.config, num_labels, head_bias, head_dropout)

    def last_token_logits(self, logits: Tensor, input_ids: Tensor) -> Tensor:
        """Each sequence's logits `[batch, labels]`: those of its last token that is not padding, as in transformers.

        Args:
            logits: `[batch, sequence, labels]`.
            input_ids: `[batch, sequence]`.

        Raises:
            BridgeError: several sequences, and no token that stands for padding.
        """
        if self.pad_token_id is None:
            if input_ids.shape[0] > 1:
                raise BridgeError(
                    f"a batch of {input_ids.shape[0]} sequences and no pad_token_id, so the last token of each is "
                    "unknown; set pad_token_id of the provider (and in config.json), or give one sequence at a time"
                )
            return logits[:, -1]
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (places * (input_ids != self.pad_token_id)).argmax(-1)
        return logits[torch.arange(input_ids.shape[0], device=logits.device), last.to(logits.device)]

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy per token `[batch, sequence]` of labels `[batch, sequence]` and logits `[sequence, batch, -1]`.

        Raises:
            BridgeError: a head of one output, whose loss cross entropy is not.
        """
        if self.num_labels == 1:
            raise BridgeError(
                "a reward or value head (num_labels=1) has no cross entropy; call the model without labels and compute "
                "the loss from its logits"
            )
        losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.t().flatten(), reduction="none")
        return losses.view(logits.shape[:2]).t().contiguous()
