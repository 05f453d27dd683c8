"""DeepSeek-V2-Lite and DeepSeek-V3 (arXiv:2405.04434, arXiv:2412.19437)."""

from megatron.bridge.recipes.base.modules import recipes_of
from megatron.bridge.recipes.base.size import Size, decoder, rope
from megatron.bridge.recipes.base.stated import stated

_APPENDIX, _SECTION = "arXiv:2405.04434, appendix B", "arXiv:2412.19437, section 4.2"
_YARN = {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
_LATENT = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_V2_LITE = _LATENT | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "q_lora_rank": None,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "initializer_range": 0.02,
    **rope(10000.0, "yarn", mscale=0.707, mscale_all_dim=0.707, **_YARN),
}
_V3 = _LATENT | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "q_lora_rank": 1536,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 3,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "rope_interleave": True,
    "initializer_range": 0.006,
    **rope(10000.0, "yarn", mscale=1.0, mscale_all_dim=1.0, **_YARN),
}
_ADAMW = {
    "model.seq_length": 4096,
    "optimizer.adam_beta1": 0.9,
    "optimizer.adam_beta2": 0.95,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_grad": 1.0,
    "scheduler.lr_warmup_iters": 2000,
}
_TRAINED_LITE = stated(
    _APPENDIX,
    # 5.7T tokens.
    _ADAMW | {"optimizer.lr": 4.2e-4, "train.global_batch_size": 4608, "scheduler.lr_decay_iters": 302000},
)
_TRAINED_V3 = stated(
    _SECTION,
    # The batch grows from 3072 to this size over the first 469B of 14.8T tokens.
    _ADAMW
    | {
        "optimizer.lr": 2.2e-4,
        "optimizer.min_lr": 2.2e-5,
        "train.global_batch_size": 15360,
        "scheduler.lr_decay_iters": 235000,
    },
)

# Queries, keys and values have projections of their own under multi-latent attention.
_LINEAR = ("linear_proj", "linear_fc1", "linear_fc2", "linear_kv_down_proj", "linear_kv_up_proj")

SIZES = {
    "deepseek_v2_lite": Size("DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V2-Lite", "15.7B", _APPENDIX,
                             _V2_LITE | decoder(2048, 10944, 27, 16, 16), _TRAINED_LITE,
                             (*_LINEAR, "linear_q_proj")),
    "deepseek_v3": Size("DeepSeek-V3", "deepseek-ai/DeepSeek-V3", "671B", _SECTION,
                        _V3 | decoder(7168, 18432, 61, 128, 128), _TRAINED_V3,
                        (*_LINEAR, "linear_q_down_proj", "linear_q_up_proj")),
}  # fmt: skip

__getattr__ = recipes_of(__name__, SIZES)
