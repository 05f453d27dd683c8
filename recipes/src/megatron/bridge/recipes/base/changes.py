"""Changes that any recipe can take: each is given a description and gives another."""

from megatron.bridge.errors import BridgeError
from megatron.bridge.recipes.base.description import Description


def precision(description: Description, name: str) -> Description:
    """Compute in another precision, by its name in `mixed_precision.precision`: `fp8`, `mxfp8`, `bf16_mixed`, ..."""
    return description.but("ours: asked for", {"mixed_precision.precision": name})


# Tokens of a sequence that one context-parallel rank holds.
_TOKENS_PER_RANK = 8192


def long_context(description: Description, seq_length: int) -> Description:
    """Longer sequences, each divided over context-parallel ranks; a step takes as many tokens as before.

    Raises:
        BridgeError: the model was not made for so many positions.
    """
    text = description.hf_config.get("text_config", description.hf_config)
    positions = text.get("max_position_embeddings")
    if positions is not None and seq_length > positions:
        raise BridgeError(
            f"long_context: seq_length={seq_length} is more than the model's {positions} positions; take at most "
            "these, or change rope_parameters and max_position_embeddings of its configuration"
        )
    before, batch = description.value("model.seq_length"), description.value("train.global_batch_size")
    changed = {"model.seq_length": seq_length, "train.global_batch_size": max(1, batch * before // seq_length)}
    ranks = -(-seq_length // _TOKENS_PER_RANK)
    if ranks > 1:
        changed["model.context_parallel_size"] = 1 << (ranks - 1).bit_length()
    return description.but(f"ours: {_TOKENS_PER_RANK} tokens on each context-parallel rank", changed)
