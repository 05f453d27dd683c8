"""Qwen2, Qwen2.5 and Qwen3 of Alibaba (arXiv:2407.10671, arXiv:2412.15115, arXiv:2505.09388)."""

from megatron.bridge.recipes.base.modules import recipes_of
from megatron.bridge.recipes.base.size import Size, decoder, rope

_PAPER = "arXiv:2505.09388, tables 1 and 2"
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "use_sliding_window": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
    "dtype": "bfloat16",
    **rope(1000000.0),
}
_TIED = {"tie_word_embeddings": True, "vocab_size": 151936}
_LARGE = {"rms_norm_eps": 1e-5}
_QWEN3 = _QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "attention_bias": False,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
}
_QWEN3_MOE = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
}
_05B, _15B = decoder(896, 4864, 24, 14, 2), decoder(1536, 8960, 28, 12, 2)
_7B, _72B = decoder(3584, 18944, 28, 28, 4), decoder(8192, 29568, 80, 64, 8)

SIZES = {
    "qwen2_05b": Size("Qwen2 0.5B", "Qwen/Qwen2-0.5B", "0.49B", "hub", _QWEN2 | _05B | _TIED),
    "qwen2_15b": Size("Qwen2 1.5B", "Qwen/Qwen2-1.5B", "1.54B", "hub", _QWEN2 | _15B | _TIED),
    "qwen2_7b": Size("Qwen2 7B", "Qwen/Qwen2-7B", "7.62B", "hub", _QWEN2 | _7B),
    "qwen2_72b": Size("Qwen2 72B", "Qwen/Qwen2-72B", "72.7B", "hub", _QWEN2 | _72B | _LARGE),
    "qwen25_05b": Size("Qwen2.5 0.5B", "Qwen/Qwen2.5-0.5B", "0.49B", "model card",
                       _QWEN2 | _05B | _TIED | {"max_position_embeddings": 32768}),
    "qwen25_15b": Size("Qwen2.5 1.5B", "Qwen/Qwen2.5-1.5B", "1.54B", "model card", _QWEN2 | _15B | _TIED),
    "qwen25_3b": Size("Qwen2.5 3B", "Qwen/Qwen2.5-3B", "3.09B", "model card",
                      _QWEN2 | decoder(2048, 11008, 36, 16, 2) | _TIED | {"max_position_embeddings": 32768}),
    "qwen25_7b": Size("Qwen2.5 7B", "Qwen/Qwen2.5-7B", "7.61B", "model card", _QWEN2 | _7B),
    "qwen25_14b": Size("Qwen2.5 14B", "Qwen/Qwen2.5-14B", "14.8B", "hub",
                       _QWEN2 | decoder(5120, 13824, 48, 40, 8) | _LARGE),
    "qwen25_32b": Size("Qwen2.5 32B", "Qwen/Qwen2.5-32B", "32.8B", "hub",
                       _QWEN2 | decoder(5120, 27648, 64, 40, 8) | _LARGE),
    "qwen25_72b": Size("Qwen2.5 72B", "Qwen/Qwen2.5-72B", "72.7B", "model card", _QWEN2 | _72B | _LARGE),
    "qwen3_06b": Size("Qwen3 0.6B", "Qwen/Qwen3-0.6B-Base", "0.6B", _PAPER,
                      _QWEN3 | decoder(1024, 3072, 28, 16, 8) | {"tie_word_embeddings": True}),
    "qwen3_17b": Size("Qwen3 1.7B", "Qwen/Qwen3-1.7B-Base", "1.7B", _PAPER,
                      _QWEN3 | decoder(2048, 6144, 28, 16, 8) | {"tie_word_embeddings": True}),
    "qwen3_4b": Size("Qwen3 4B", "Qwen/Qwen3-4B-Base", "4.0B", "model card",
                     _QWEN3 | decoder(2560, 9728, 36, 32, 8) | {"tie_word_embeddings": True}),
    "qwen3_8b": Size("Qwen3 8B", "Qwen/Qwen3-8B-Base", "8.2B", "model card",
                     _QWEN3 | decoder(4096, 12288, 36, 32, 8)),
    "qwen3_14b": Size("Qwen3 14B", "Qwen/Qwen3-14B-Base", "14.8B", "model card",
                      _QWEN3 | decoder(5120, 17408, 40, 40, 8)),
    "qwen3_32b": Size("Qwen3 32B", "Qwen/Qwen3-32B", "32.8B", "model card",
                      _QWEN3 | decoder(5120, 25600, 64, 64, 8, max_position_embeddings=40960)),
    "qwen3_30b_a3b": Size("Qwen3 30B-A3B", "Qwen/Qwen3-30B-A3B-Base", "30.5B", "model card",
                          _QWEN3_MOE | decoder(2048, 6144, 48, 32, 4, moe_intermediate_size=768)),
    "qwen3_235b_a22b": Size("Qwen3 235B-A22B", "Qwen/Qwen3-235B-A22B", "235B", "model card",
                            _QWEN3_MOE | decoder(4096, 12288, 94, 64, 4, moe_intermediate_size=1536)
                            | {"max_position_embeddings": 40960}),
}  # fmt: skip

__getattr__ = recipes_of(__name__, SIZES)
