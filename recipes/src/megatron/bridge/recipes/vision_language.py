"""LLaVA-1.5 (arXiv:2310.03744) and Qwen2.5-VL (arXiv:2502.13923). What is trained here is their language, on text."""

from megatron.bridge.recipes.base.modules import recipes_of
from megatron.bridge.recipes.base.size import Size, decoder, rope

_LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 32000,
    "image_seq_length": 576,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": False,
    "dtype": "float16",
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
_VICUNA = {
    "model_type": "llama",
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    **rope(10000.0),
}
_QWEN = {
    "model_type": "qwen2_5_vl_text",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128000,
    "use_sliding_window": False,
    **rope(1000000.0, mrope_section=[16, 24, 24]),
}
_QWEN_VL = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "dtype": "bfloat16",
}
_TOWER = {
    "model_type": "qwen2_5_vl",
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_act": "silu",
}

SIZES = {
    "llava15_7b": Size("LLaVA-1.5 7B", "llava-hf/llava-1.5-7b-hf", "7.06B", "hub",
                       _LLAVA | {"text_config": _VICUNA | decoder(4096, 11008, 32, 32, 32)}),
    "qwen25_vl_3b": Size("Qwen2.5-VL 3B", "Qwen/Qwen2.5-VL-3B-Instruct", "3.75B", "hub",
                         _QWEN_VL | {"vision_config": _TOWER | {"out_hidden_size": 2048},
                                     "tie_word_embeddings": True,
                                     "text_config": _QWEN | decoder(2048, 11008, 36, 16, 2)
                                     | {"vocab_size": 151936, "tie_word_embeddings": True}}),
    "qwen25_vl_7b": Size("Qwen2.5-VL 7B", "Qwen/Qwen2.5-VL-7B-Instruct", "8.29B", "hub",
                         _QWEN_VL | {"vision_config": _TOWER | {"out_hidden_size": 3584},
                                     "tie_word_embeddings": False,
                                     "text_config": _QWEN | decoder(3584, 18944, 28, 28, 4)
                                     | {"vocab_size": 152064, "tie_word_embeddings": False}}),
}  # fmt: skip

__getattr__ = recipes_of(__name__, SIZES)
