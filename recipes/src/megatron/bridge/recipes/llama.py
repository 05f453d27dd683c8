"""Llama 2, 3, 3.1, 3.2 and 3.3 of Meta."""

from megatron.bridge.recipes.base.modules import recipes_of
from megatron.bridge.recipes.base.size import Size, decoder, rope
from megatron.bridge.recipes.base.stated import stated

_PAPER_2, _PAPER_3 = "arXiv:2307.09288, section 2.2", "arXiv:2407.21783, section 3.4 and table 3"
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_LLAMA2 = _LLAMA | {"vocab_size": 32000, "max_position_embeddings": 4096} | rope(10000.0)
_LLAMA3 = _LLAMA | {"vocab_size": 128256, "max_position_embeddings": 8192} | rope(500000.0)
_SCALED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA31 = _LLAMA3 | {"max_position_embeddings": 131072} | rope(500000.0, "llama3", factor=8.0, **_SCALED)
_LLAMA32 = _LLAMA31 | {"tie_word_embeddings": True} | rope(500000.0, "llama3", factor=32.0, **_SCALED)
_8B, _70B = decoder(4096, 14336, 32, 32, 8), decoder(8192, 28672, 80, 64, 8)

_TRAINED_2 = stated(
    _PAPER_2,
    {
        "model.seq_length": 4096,
        "train.global_batch_size": 1024,  # 4M tokens
        "optimizer.adam_beta1": 0.9,
        "optimizer.adam_beta2": 0.95,
        "optimizer.adam_eps": 1e-5,
        "optimizer.weight_decay": 0.1,
        "optimizer.clip_grad": 1.0,
        "scheduler.lr_decay_style": "cosine",
        "scheduler.lr_warmup_iters": 2000,
        "scheduler.lr_decay_iters": 500000,  # 2T tokens
    },
)
_SMALL_2 = _TRAINED_2 | stated(_PAPER_2, {"optimizer.lr": 3e-4, "optimizer.min_lr": 3e-5})
_LARGE_2 = _TRAINED_2 | stated(_PAPER_2, {"optimizer.lr": 1.5e-4, "optimizer.min_lr": 1.5e-5})
_TRAINED_8B = stated(_PAPER_3, {"optimizer.lr": 3e-4, "model.seq_length": 8192})
_TRAINED_70B = stated(_PAPER_3, {"optimizer.lr": 1.5e-4, "model.seq_length": 8192})
_TRAINED_405B = stated(
    _PAPER_3,
    {
        "model.seq_length": 8192,
        "train.global_batch_size": 2048,  # 16M tokens, from 2.87T trained tokens on
        "optimizer.lr": 8e-5,
        "optimizer.min_lr": 8e-7,
        "scheduler.lr_decay_style": "cosine",
        "scheduler.lr_warmup_iters": 8000,
        "scheduler.lr_decay_iters": 1200000,
    },
)

SIZES = {
    "llama2_7b": Size("Llama 2 7B", "meta-llama/Llama-2-7b-hf", "6.74B", "model card",
                      _LLAMA2 | decoder(4096, 11008, 32, 32, 32), _SMALL_2),
    "llama2_13b": Size("Llama 2 13B", "meta-llama/Llama-2-13b-hf", "13.0B", "model card",
                       _LLAMA2 | decoder(5120, 13824, 40, 40, 40), _SMALL_2),
    "llama2_70b": Size("Llama 2 70B", "meta-llama/Llama-2-70b-hf", "69.0B", "model card",
                       _LLAMA2 | _70B, _LARGE_2),
    "llama3_8b": Size("Llama 3 8B", "meta-llama/Meta-Llama-3-8B", "8.03B", "model card",
                      _LLAMA3 | _8B, _TRAINED_8B),
    "llama3_70b": Size("Llama 3 70B", "meta-llama/Meta-Llama-3-70B", "70.6B", "model card",
                       _LLAMA3 | _70B, _TRAINED_70B),
    "llama31_8b": Size("Llama 3.1 8B", "meta-llama/Llama-3.1-8B", "8.03B", "model card",
                       _LLAMA31 | _8B, _TRAINED_8B),
    "llama31_70b": Size("Llama 3.1 70B", "meta-llama/Llama-3.1-70B", "70.6B", "model card",
                        _LLAMA31 | _70B, _TRAINED_70B),
    "llama31_405b": Size("Llama 3.1 405B", "meta-llama/Llama-3.1-405B", "406B", "model card",
                         _LLAMA31 | decoder(16384, 53248, 126, 128, 8), _TRAINED_405B),
    "llama32_1b": Size("Llama 3.2 1B", "meta-llama/Llama-3.2-1B", "1.24B", "model card",
                       _LLAMA32 | decoder(2048, 8192, 16, 32, 8, head_dim=64)),
    "llama32_3b": Size("Llama 3.2 3B", "meta-llama/Llama-3.2-3B", "3.21B", "model card",
                       _LLAMA32 | decoder(3072, 8192, 28, 24, 8, head_dim=128)),
    "llama33_70b": Size("Llama 3.3 70B", "meta-llama/Llama-3.3-70B-Instruct", "70.6B", "model card",
                        _LLAMA31 | _70B),
}  # fmt: skip

__getattr__ = recipes_of(__name__, SIZES)
