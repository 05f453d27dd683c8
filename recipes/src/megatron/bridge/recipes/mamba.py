"""Mamba (arXiv:2312.00752)."""

from megatron.bridge.recipes.base.modules import recipes_of
from megatron.bridge.recipes.base.size import Size
from megatron.bridge.recipes.base.stated import stated

_PAPER = "arXiv:2312.00752, appendix E.2"
_MAMBA = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    "vocab_size": 50280,
    "state_size": 16,
    "conv_kernel": 4,
    "expand": 2,
    "hidden_act": "silu",
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "residual_in_fp32": True,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
_TRAINED = stated(
    _PAPER,
    {
        "model.seq_length": 2048,
        "optimizer.adam_beta1": 0.9,
        "optimizer.adam_beta2": 0.95,
        "optimizer.weight_decay": 0.1,
        "optimizer.clip_grad": 1.0,
        "scheduler.lr_decay_style": "cosine",
        "optimizer.min_lr": 1e-5,
    },
)


def _width(hidden: int, layers: int) -> dict[str, int]:
    return {"hidden_size": hidden, "num_hidden_layers": layers, "time_step_rank": hidden // 16}


_MIXER = ("in_proj", "out_proj")

SIZES = {
    "mamba_130m": Size("Mamba 130M", "state-spaces/mamba-130m-hf", "129M", "hub",
                       _MAMBA | _width(768, 24), _TRAINED, _MIXER),
    "mamba_2_8b": Size("Mamba 2.8B", "state-spaces/mamba-2.8b-hf", "2.77B", "hub",
                       _MAMBA | _width(2560, 64), _TRAINED, _MIXER),
}  # fmt: skip

__getattr__ = recipes_of(__name__, SIZES)
