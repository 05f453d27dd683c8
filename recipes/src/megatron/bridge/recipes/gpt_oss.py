"""gpt-oss of OpenAI (arXiv:2508.10925), which says nothing of the training's settings."""

from megatron.bridge.recipes.base.modules import recipes_of
from megatron.bridge.recipes.base.size import Size, decoder, rope

_TABLE = "arXiv:2508.10925, table 1"
_YARN = {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
_GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "hidden_act": "silu",
    "swiglu_limit": 7.0,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "router_aux_loss_coef": 0.9,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    **rope(150000.0, "yarn", original_max_position_embeddings=4096, **_YARN),
}


def _layers(count: int) -> dict[str, list[str]]:
    return {"layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(count)]}


SIZES = {
    "gpt_oss_20b": Size("gpt-oss 20B", "openai/gpt-oss-20b", "20.91B", _TABLE,
                        _GPT_OSS | decoder(2880, 2880, 24, 64, 8, num_local_experts=32) | _layers(24)),
    "gpt_oss_120b": Size("gpt-oss 120B", "openai/gpt-oss-120b", "116.83B", _TABLE,
                         _GPT_OSS | decoder(2880, 2880, 36, 64, 8, num_local_experts=128) | _layers(36)),
}  # fmt: skip

__getattr__ = recipes_of(__name__, SIZES)
