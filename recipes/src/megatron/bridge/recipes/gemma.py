"""Gemma 2 and the language models of Gemma 3, of Google (arXiv:2408.00118, arXiv:2503.19786)."""

from megatron.bridge.recipes.base.modules import recipes_of
from megatron.bridge.recipes.base.size import Size, decoder

_PAPER_2, _PAPER_3 = "arXiv:2408.00118, table 2", "arXiv:2503.19786, table 1"
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "dtype": "bfloat16",
}
_GEMMA2 = _GEMMA | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_GEMMA3_1B = _GEMMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}
_GEMMA3 = _GEMMA3_1B | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    },
}


def _alternating(layers: int) -> dict[str, list[str]]:
    """Gemma 2: every other layer sees all."""
    return {"layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]}


def _five_to_one(layers: int) -> dict[str, list[str]]:
    """Gemma 3: every sixth layer sees all."""
    return {"layer_types": [("full_attention" if layer % 6 == 5 else "sliding_attention") for layer in range(layers)]}


SIZES = {
    "gemma2_2b": Size("Gemma 2 2B", "google/gemma-2-2b", "2.61B", _PAPER_2,
                      _GEMMA2 | decoder(2304, 9216, 26, 8, 4) | _alternating(26)),
    "gemma2_9b": Size("Gemma 2 9B", "google/gemma-2-9b", "9.24B", _PAPER_2,
                      _GEMMA2 | decoder(3584, 14336, 42, 16, 8) | _alternating(42)),
    "gemma2_27b": Size("Gemma 2 27B", "google/gemma-2-27b", "27.2B", _PAPER_2,
                       _GEMMA2 | decoder(4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144)
                       | _alternating(46)),
    "gemma3_1b": Size("Gemma 3 1B", "google/gemma-3-1b-pt", "1.00B", _PAPER_3,
                      _GEMMA3_1B | decoder(1152, 6912, 26, 4, 1) | _five_to_one(26)),
    "gemma3_4b": Size("Gemma 3 4B, text", "google/gemma-3-4b-pt", "3.88B", _PAPER_3,
                      _GEMMA3 | decoder(2560, 10240, 34, 8, 4) | _five_to_one(34)),
    "gemma3_12b": Size("Gemma 3 12B, text", "google/gemma-3-12b-pt", "11.77B", _PAPER_3,
                       _GEMMA3 | decoder(3840, 15360, 48, 16, 8) | _five_to_one(48)),
    "gemma3_27b": Size("Gemma 3 27B, text", "google/gemma-3-27b-pt", "27.0B", _PAPER_3,
                       _GEMMA3 | decoder(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168)
                       | _five_to_one(62)),
}  # fmt: skip

__getattr__ = recipes_of(__name__, SIZES)
