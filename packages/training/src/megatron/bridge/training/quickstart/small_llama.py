"""A small random Llama with a tokenizer of its own, made where there is no network."""

from collections.abc import Iterable
from pathlib import Path

VOCAB_SIZE = 2048


def make_small_llama(folder: Path, texts: Iterable[str], positions: int) -> int:
    """Train a byte-level BPE on `texts` and save a random Llama for it; returns its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    from megatron.bridge.data.tokenizers import train_bpe_tokenizer

    partial = folder.with_name(f".{folder.name}.partial")
    train_bpe_tokenizer(texts, VOCAB_SIZE, partial)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(partial)
    partial.rename(folder)
    return sum(parameter.numel() for parameter in model.parameters())
