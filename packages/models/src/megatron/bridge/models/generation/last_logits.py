"""The logits of a text's last position, at any layout: from a cache of keys and values, or by reading it all again."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.live_weights import Layout, as_chunks
from megatron.bridge.conversion.logits import megatron_logits

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.conversion.live import Model

# tokens so far [batch, sequence] -> logits of the last position [batch, padded vocabulary] in float32, on every rank.
LastLogits = Callable[["Tensor"], "Tensor"]


def last_logits(model: "Model", batch: int, longest: int) -> LastLogits:
    """How this model reads a text that grows by a token at a time. Collective over the model's ranks.

    Megatron-Core's inference wrapper, with its cache of keys and values, where the model's layers have one and the
    layout allows it; otherwise the whole text goes through the model for every token.

    Args:
        model: chunks of this rank.
        batch: rows of a text.
        longest: tokens that a row may come to.
    """
    chunks = as_chunks(model)
    if uncached_because(chunks) is None:
        return Cached(chunks[0], batch, longest)
    return Whole(chunks)


def uncached_because(chunks: list[Any]) -> str | None:
    """Why a model is read without a cache; None: it has one."""
    layout, (first, *others) = Layout.of(chunks), chunks
    config = first.config
    reasons = {
        "virtual pipeline stages": bool(others),
        "context parallelism": layout.context_size > 1,
        "sequence parallelism": config.sequence_parallel,
        "multi-latent attention": config.multi_latent_attention,
        "an attention variant": config.experimental_attention_variant is not None,
        "layers of several kinds": not _is_plain(first),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _is_plain(chunk: Any) -> bool:
    """Whether every layer is Megatron-Core's own with self-attention, and the model reads tokens alone."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.transformer_layer import TransformerLayer

    if not isinstance(chunk, GPTModel):
        return False
    layers = list(chunk.decoder.layers)
    return all(isinstance(each, TransformerLayer) and isinstance(each.self_attention, SelfAttention) for each in layers)


class Whole:
    """Reads the whole text for every token."""

    def __init__(self, chunks: list[Any]) -> None:
        self._chunks = chunks
        layout = Layout.of(chunks)
        # Ranks that share a sequence hold equal parts of it; what fills up stands behind, where no token looks.
        self._parts = 2 * layout.context_size * layout.tensor_size

    def __call__(self, tokens: "Tensor") -> "Tensor":
        last = tokens[:, -1:]
        missing = -tokens.shape[1] % self._parts
        filled = last.new_empty(tokens.shape[0], tokens.shape[1] + missing)
        filled[:, : tokens.shape[1]], filled[:, tokens.shape[1] :] = tokens, last
        return megatron_logits(self._chunks, filled)[:, tokens.shape[1] - 1]


class Cached:
    """Megatron-Core's inference wrapper: each call reads what is new."""

    def __init__(self, chunk: Any, batch: int, longest: int) -> None:
        from megatron.core.inference.contexts import StaticInferenceContext
        from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper

        self._layout = Layout.of([chunk])
        self._vocabulary = None
        self._wrapper = GPTInferenceWrapper(chunk, StaticInferenceContext(batch, longest))
        self._wrapper.prep_model_for_inference()
        self._read = 0

    def __call__(self, tokens: "Tensor") -> "Tensor":
        inputs = self._wrapper.prep_inference_input(tokens)
        window = self._wrapper.get_batch_for_context_window(inputs, self._read, tokens.shape[1])
        self._read = tokens.shape[1]
        logits = self._wrapper.run_one_forward_step(window)
        return self._everywhere(None if logits is None else logits[:, -1].float().contiguous(), tokens)

    def _everywhere(self, logits: "Tensor | None", tokens: "Tensor") -> "Tensor":
        """The last stage's logits on every stage."""
        import torch
        import torch.distributed as dist

        layout = self._layout
        if layout.pipeline_size == 1:
            assert logits is not None
            return logits
        last = layout.pipeline_size - 1
        width: list[Any] = [None if logits is None else logits.shape[-1]]
        dist.broadcast_object_list(width, group=layout.pipeline_group, group_src=last)
        if logits is None:
            logits = torch.empty(tokens.shape[0], width[0], device=tokens.device)
        dist.broadcast(logits, group=layout.pipeline_group, group_src=last)
        return logits
