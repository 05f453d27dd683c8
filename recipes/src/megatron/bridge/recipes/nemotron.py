"""Nemotron-4 and Nemotron-H of NVIDIA (arXiv:2402.16819, arXiv:2406.11704, arXiv:2504.03624)."""

from megatron.bridge.recipes.base.modules import recipes_of
from megatron.bridge.recipes.base.size import Size, decoder
from megatron.bridge.recipes.base.stated import stated

_NEMOTRON = {
    "architectures": ["NemotronForCausalLM"],
    "model_type": "nemotron",
    "vocab_size": 256000,
    "hidden_act": "relu2",
    "norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
_PATTERN = "M-M-M-M*-" + 3 * "M-M-M-M-M*-" + "M-M-M-M-M-"
_KINDS = {"M": "mamba", "-": "mlp", "*": "attention"}
_NEMOTRON_H = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": 131072,
    "layers_block_type": [_KINDS[kind] for kind in _PATTERN],
    "head_dim": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "expand": 2,
    "mlp_hidden_act": "relu2",
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_TRAINED_15B = stated("arXiv:2402.16819, section 2", {"model.seq_length": 4096, "train.global_batch_size": 1152})
_TRAINED_340B = stated("arXiv:2406.11704, section 2", {"model.seq_length": 4096, "train.global_batch_size": 2304})
_TRAINED_H = stated(
    "arXiv:2504.03624, section 2",
    {
        "model.seq_length": 8192,
        "train.global_batch_size": 768,
        "optimizer.lr": 8e-4,
        "optimizer.min_lr": 8e-6,
        "optimizer.weight_decay": 0.1,
        "optimizer.adam_beta1": 0.9,
        "optimizer.adam_beta2": 0.95,
    },
)

SIZES = {
    "minitron_4b": Size("Minitron 4B", "nvidia/Minitron-4B-Base", "4.19B", "hub",
                        _NEMOTRON | decoder(3072, 9216, 32, 24, 8, head_dim=128)),
    "nemotron4_15b": Size("Nemotron-4 15B", "nvidia/nemotron-4-15b", "15.6B", "arXiv:2402.16819, section 2",
                          _NEMOTRON | decoder(6144, 24576, 32, 48, 8, head_dim=128), _TRAINED_15B),
    "nemotron4_340b": Size("Nemotron-4 340B", "nvidia/Nemotron-4-340B-Base", "341B", "arXiv:2406.11704, table 1",
                           _NEMOTRON | decoder(18432, 73728, 96, 96, 8, head_dim=192), _TRAINED_340B),
    "nemotron_h_8b": Size("Nemotron-H 8B", "nvidia/Nemotron-H-8B-Base-8K", "8.1B", "hub",
                          _NEMOTRON_H | decoder(4096, 21504, 52, 32, 8), _TRAINED_H),
}  # fmt: skip

__getattr__ = recipes_of(__name__, SIZES)
