"""OLMo 2 of the Allen Institute for AI (arXiv:2501.00656)."""

from megatron.bridge.recipes.base.modules import recipes_of
from megatron.bridge.recipes.base.size import Size, decoder, rope
from megatron.bridge.recipes.base.stated import Stated, stated

_PAPER = "arXiv:2501.00656, table 3"
_OLMO2 = {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "vocab_size": 100352,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    **rope(500000.0),
}


def _trained(lr: float, batch: int, tokens: float) -> dict[str, Stated]:
    """Peak learning rate, sequences per step, and tokens of the whole training."""
    return stated(
        _PAPER,
        {
            "model.seq_length": 4096,
            "train.global_batch_size": batch,
            "optimizer.lr": lr,
            "optimizer.clip_grad": 1.0,
            "scheduler.lr_decay_style": "cosine",
            "scheduler.lr_warmup_iters": 2000,
            "scheduler.lr_decay_iters": int(tokens / batch / 4096),
        },
    )


SIZES = {
    "olmo2_1b": Size("OLMo 2 1B", "allenai/OLMo-2-0425-1B", "1.48B", "hub",
                     _OLMO2 | decoder(2048, 8192, 16, 16, 16)),
    "olmo2_7b": Size("OLMo 2 7B", "allenai/OLMo-2-1124-7B", "7.3B", "hub",
                     _OLMO2 | decoder(4096, 11008, 32, 32, 32), _trained(3e-4, 1024, 4e12)),
    "olmo2_13b": Size("OLMo 2 13B", "allenai/OLMo-2-1124-13B", "13.7B", "hub",
                      _OLMO2 | decoder(5120, 13824, 40, 40, 40), _trained(9e-4, 2048, 5e12)),
    "olmo2_32b": Size("OLMo 2 32B", "allenai/OLMo-2-0325-32B", "32.2B", "hub",
                      _OLMO2 | decoder(5120, 27648, 64, 40, 8), _trained(6e-4, 2048, 6e12)),
}  # fmt: skip

__getattr__ = recipes_of(__name__, SIZES)
