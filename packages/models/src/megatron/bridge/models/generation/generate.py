"""The loop: read, choose, append."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.generation.choice import Choice, Chooser
from megatron.bridge.models.generation.last_logits import last_logits

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.conversion.live import Model


def generate(
    model: "Model",
    tokens: "Tensor",
    max_new_tokens: int,
    *,
    stops: Collection[int] = (),
    choice: Choice | None = None,
    vocab_size: int | None = None,
) -> "Iterator[Tensor]":
    """Yield the next token of every row, until each has met a stop or `max_new_tokens` are there. Collective.

    Args:
        model: chunks of this rank.
        tokens: prompts of equal length, [batch, sequence], the same on every rank.
        max_new_tokens: the most that are yielded.
        stops: tokens that end a row; the stop itself is yielded, and repeated while other rows go on.
        choice: how tokens are chosen; None takes the most likely.
        vocab_size: rows of the vocabulary that may be chosen; None takes all.

    Returns:
        Tokens [batch], the same on every rank.

    Raises:
        BridgeError: prompts without tokens, or more tokens than the model has positions for.
    """
    import torch

    from megatron.bridge.conversion.live_weights import as_chunks

    batch, start = tokens.shape
    chunks = as_chunks(model)
    positions = getattr(chunks[0], "max_sequence_length", None)
    if start == 0 or max_new_tokens < 1:
        raise BridgeError(f"a prompt of {start} tokens and {max_new_tokens} new ones: both must be at least 1")
    if positions is not None and start + max_new_tokens > positions:
        raise BridgeError(
            f"{start} tokens of the prompt and {max_new_tokens} new ones are more than the model's {positions} "
            "positions; shorten the prompt or ask for fewer"
        )
    chooser = Chooser(choice or Choice(), tokens.device)
    done = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
    ends = torch.tensor(sorted(stops), dtype=tokens.dtype, device=tokens.device)
    with _without_dropout(chunks):
        read = last_logits(chunks, batch, start + max_new_tokens)
        for _ in range(max_new_tokens):
            with torch.no_grad():
                chosen = chooser(tokens, read(tokens)[:, :vocab_size])
            chosen = torch.where(done, tokens[:, -1], chosen)
            tokens = torch.cat([tokens, chosen[:, None]], 1)
            yield chosen
            done |= torch.isin(chosen, ends)
            if done.all():
                return


@contextmanager
def _without_dropout(chunks: list[Any]) -> Iterator[None]:
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, was in zip(chunks, training, strict=True):
            chunk.train(was)
