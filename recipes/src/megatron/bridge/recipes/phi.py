"""Phi-3 and Phi-4 of Microsoft (arXiv:2404.14219, arXiv:2412.08905)."""

from megatron.bridge.recipes.base.modules import recipes_of
from megatron.bridge.recipes.base.size import Size, decoder, rope
from megatron.bridge.recipes.base.stated import stated

_PHI3 = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "sliding_window": 2047,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    **rope(10000.0),
}
_PHI4 = _PHI3 | {
    "vocab_size": 100352,
    "max_position_embeddings": 16384,
    "sliding_window": None,
    **rope(250000.0),
}
_TRAINED_4 = stated(
    "arXiv:2412.08905, section 3",
    {
        "model.seq_length": 4096,
        "train.global_batch_size": 5760,
        "optimizer.lr": 3e-4,
        "optimizer.weight_decay": 0.1,
        "scheduler.lr_decay_style": "linear",
    },
)
_MEDIUM = decoder(5120, 17920, 40, 40, 10)

SIZES = {
    "phi3_mini": Size("Phi-3 mini", "microsoft/Phi-3-mini-4k-instruct", "3.8B", "arXiv:2404.14219, section 2",
                      _PHI3 | decoder(3072, 8192, 32, 32, 32)),
    "phi3_medium": Size("Phi-3 medium", "microsoft/Phi-3-medium-4k-instruct", "14.0B", "model card",
                        _PHI3 | _MEDIUM),
    "phi4": Size("Phi-4", "microsoft/phi-4", "14.7B", "model card", _PHI4 | _MEDIUM, _TRAINED_4),
}  # fmt: skip

__getattr__ = recipes_of(__name__, SIZES)
