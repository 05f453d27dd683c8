"""Megatron-Core's language models, with a loss that the padded part of the vocabulary takes no part in."""

from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor

from megatron.bridge.models.block_variant import BlockVariant
from megatron.bridge.models.expert_groups import rank_groups
from megatron.bridge.models.layer_specs.decoder_layer import VariantLayer
from megatron.bridge.models.layer_specs.norms import torch_norm
from megatron.bridge.models.layer_specs.sinusoids import SinusoidalPositions, Waves


class BridgeLanguageModel(LanguageModule):
    """A model that knows its layer spec's name, and by `unpadded_vocab_size` how many of its output rows are real.

    Megatron pads the vocabulary to suit tensor parallelism. Logits of padded rows would add to every softmax, so that
    the same weights would have another loss at another layout; here they are masked.
    """

    unpadded_vocab_size: int | None = None
    layer_spec: str | None = None
    logits_multiplier: float = 1.0
    logits_softcap: float | None = None

    def apply_variant(self, variant: BlockVariant) -> None:
        """Take on what a variant says about the model outside its layers' specs."""
        self.logits_multiplier, self.logits_softcap = variant.logits_multiplier, variant.logits_softcap
        # What the configuration calls positions are those that can be looked up.
        self.max_position_embeddings -= variant.position_offset
        # The stage of prediction layers has an embedding too.
        embeds = hasattr(self, "embedding")
        if embeds and variant.embedding_multiplier != 1.0:
            self.embedding.word_embeddings.register_forward_hook(_Multiplier(variant.embedding_multiplier))
        if embeds and variant.sinusoidal_positions is not None:
            self._add_sinusoids(variant.sinusoidal_positions)
        if embeds and variant.position_offset:
            self.embedding.position_embeddings.register_forward_pre_hook(_Offset(variant.position_offset))
        if embeds and variant.embedding_norm:
            self._add_embedding_norm(variant)
        if self.share_embeddings_and_output_weights and self.post_process and embeds:
            # Megatron-Core makes one all the same for prediction layers on a stage behind the first, and never uses it.
            self.output_layer.weight = None
        if self.post_process and variant.output_bias:
            self._add_output_bias()
        if variant.group_ranking is not None:
            rank_groups(self, variant.group_ranking)
        for layer in self.modules():
            if isinstance(layer, VariantLayer):
                layer.parallel = variant.parallel_block

    def _add_sinusoids(self, waves: Waves) -> None:
        place = self.embedding.word_embeddings.weight
        positions = SinusoidalPositions(self.max_sequence_length, self.config.hidden_size, waves)
        self.embedding.position_embeddings = positions.to(place.device, place.dtype)
        self.embedding.add_position_embedding = True
        # Positions are added to whole sequences, which are scattered after that.
        self.embedding.reduce_scatter_embeddings = self.embedding.word_embeddings.reduce_scatter_embeddings = False

    def _add_output_bias(self) -> None:
        rows = self.output_layer.output_size_per_partition
        place = next(self.decoder.parameters())
        bias = torch.nn.Parameter(torch.zeros(rows, dtype=self.config.params_dtype, device=place.device))
        set_tensor_model_parallel_attributes(bias, True, 0, 1)
        self.output_layer.bias = bias

    def _add_embedding_norm(self, variant: BlockVariant) -> None:
        norm = torch_norm(
            self.config,
            self.config.hidden_size,
            self.config.layernorm_epsilon,
            weight=variant.norm_weight,
            bias=variant.norm_bias,
        )
        place = self.embedding.word_embeddings.weight
        self.embedding.layernorm = norm.to(place.device, place.dtype)
        self.embedding.register_forward_hook(lambda embedding, inputs, output: embedding.layernorm(output))

    def _scale_logits(self, logits: Tensor) -> Tensor:
        if self.logits_multiplier != 1.0:
            logits = logits * self.logits_multiplier
        if self.logits_softcap is not None:
            logits = torch.tanh(logits / self.logits_softcap) * self.logits_softcap
        return super()._scale_logits(logits)

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


class BridgeGPTModel(BridgeLanguageModel, GPTModel):
    """Megatron-Core's GPT model."""


class _Offset:
    """A forward pre-hook that adds to a module's one input."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __call__(self, module: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0] + self.value,)


class _Multiplier:
    """A forward hook that multiplies a module's output by a value in the output's own dtype."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * torch.tensor(self.value, dtype=output.dtype, device=output.device)
