"""Mistral 7B and Mixtral of Mistral AI; the papers (arXiv:2310.06825, arXiv:2401.04088) say little of the training."""

from megatron.bridge.recipes.base.modules import recipes_of
from megatron.bridge.recipes.base.size import Size, decoder, rope

_MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_MIXTRAL = _MISTRAL | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    **rope(1000000.0),
}
_7B = decoder(4096, 14336, 32, 32, 8)
_FIRST = {"vocab_size": 32000, "sliding_window": 4096, **rope(10000.0)}
_THIRD = {"vocab_size": 32768, "sliding_window": None, **rope(1000000.0)}

SIZES = {
    "mistral_7b": Size("Mistral 7B v0.1", "mistralai/Mistral-7B-v0.1", "7.24B", "hub",
                       _MISTRAL | _7B | _FIRST),
    "mistral_7b_v03": Size("Mistral 7B v0.3", "mistralai/Mistral-7B-v0.3", "7.25B", "hub",
                           _MISTRAL | _7B | _THIRD),
    "mixtral_8x7b": Size("Mixtral 8x7B", "mistralai/Mixtral-8x7B-v0.1", "46.7B", "hub",
                         _MIXTRAL | _7B | {"router_aux_loss_coef": 0.02}),
    "mixtral_8x22b": Size("Mixtral 8x22B", "mistralai/Mixtral-8x22B-v0.1", "141B", "hub",
                          _MIXTRAL | decoder(6144, 16384, 56, 48, 8)
                          | {"max_position_embeddings": 65536, "router_aux_loss_coef": 0.001}),
}  # fmt: skip

__getattr__ = recipes_of(__name__, SIZES)
