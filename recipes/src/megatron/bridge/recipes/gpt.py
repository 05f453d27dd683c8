"""GPT-2 of OpenAI and GPT-NeoX of EleutherAI (arXiv:2204.06745)."""

from typing import Any

from megatron.bridge.recipes.base.modules import recipes_of
from megatron.bridge.recipes.base.size import Size, decoder
from megatron.bridge.recipes.base.stated import stated

_PAPER = "arXiv:2204.06745, table 1 and section 3"
_GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
_NEOX = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "vocab_size": 50432,
    "hidden_act": "gelu_fast",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "use_parallel_residual": True,
    "attention_bias": True,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "dtype": "float16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}
_TRAINED = stated(
    _PAPER,
    {
        "model.seq_length": 2048,
        "train.global_batch_size": 1538,
        "train.train_iters": 150000,
        "optimizer.lr": 0.97e-4,
        "optimizer.min_lr": 0.97e-5,
        "optimizer.adam_beta1": 0.9,
        "optimizer.adam_beta2": 0.95,
        "optimizer.weight_decay": 0.01,
        "optimizer.clip_grad": 1.0,
        "scheduler.lr_decay_style": "cosine",
        "scheduler.lr_warmup_fraction": 0.01,
    },
)


def _width(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {"n_embd": hidden, "n_layer": layers, "n_head": heads}


SIZES = {
    "gpt2": Size("GPT-2", "openai-community/gpt2", "124M", "hub", _GPT2 | _width(768, 12, 12)),
    "gpt2_xl": Size("GPT-2 XL", "openai-community/gpt2-xl", "1.56B", "hub", _GPT2 | _width(1600, 48, 25)),
    "gpt_neox_20b": Size("GPT-NeoX 20B", "EleutherAI/gpt-neox-20b", "20.6B", "arXiv:2204.06745, table 1",
                         _NEOX | decoder(6144, 24576, 44, 64, 64), _TRAINED),
}  # fmt: skip

__getattr__ = recipes_of(__name__, SIZES)
