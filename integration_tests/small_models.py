"""A small Llama and a tokenizer, made from what every checkout has."""

from pathlib import Path

from megatron.bridge.testing import save_random_model

REPOSITORY = Path(__file__).parents[1]


def save_small_llama(folder: Path, **changes: object) -> None:
    """A random Llama of 4 heads with the tokenizer of `save_small_tokenizer`, in fp32."""
    from transformers import LlamaConfig

    values = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "dtype": "float32",
    }
    save_random_model(LlamaConfig(**(values | changes)), folder)


def save_small_tokenizer(folder: Path) -> None:
    """A BPE of 512 tokens trained on this repository's own prose."""
    from megatron.bridge.data.tokenizers import train_bpe_tokenizer

    train_bpe_tokenizer(prose(), 512, folder)


def prose() -> list[str]:
    """Text that every checkout has: the packages' sources."""
    return [file.read_text("utf-8") for file in sorted(REPOSITORY.glob("packages/*/src/**/*.py"))]
