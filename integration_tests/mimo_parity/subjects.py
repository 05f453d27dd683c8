"""The tiny vision-language models that placements are compared by."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

IMAGE_TOKEN = 100
_LLAMA = {
    **{"model_type": "llama", "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
_MIXTRAL = _LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
_CLIP = {
    **{"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 7, "num_channels": 3},
}
_SIGLIP = _CLIP | {"model_type": "siglip_vision_model"}
_QWEN = {
    **{"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 64},
    **{"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"max_position_embeddings": 128, "use_sliding_window": False},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
_QWEN_TOWER = {
    **{"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "window_size": 16},
    **{"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "fullatt_block_indexes": [1]},
}
_OLDER_TOWER = {
    **{"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4},
    **{"spatial_merge_size": 2, "temporal_patch_size": 2},
}


@dataclass(frozen=True)
class Subject:
    """One model.

    Args:
        config: makes its configuration.
        draw: inputs of so many images, at random, and the number of features of each.
    """

    config: Callable[[], Any]
    draw: Callable[[int, Generator], tuple[dict[str, Tensor], list[int]]]


def llava_config(
    *, tied: bool = False, text: dict[str, Any] | None = None, dtype: str = "float32", **tower: Any
) -> Any:
    """Two layers each; every image is 16 features."""
    from transformers import LlavaConfig

    config = LlavaConfig(
        text_config=_LLAMA if text is None else text,
        vision_config=_CLIP | tower,
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    return config


def _siglip_config() -> Any:
    """LLaVA on the last layer of SigLIP's tower, which has a head that LLaVA does not use."""
    config = llava_config(**_SIGLIP)
    config.vision_feature_layer, config.vision_feature_select_strategy = -1, "full"
    return config


def mixtral_config(balancing: float = 0.0) -> Any:
    """LLaVA with a mixture of four experts; `balancing` weighs the loss of its router."""
    return llava_config(text=_MIXTRAL | {"router_aux_loss_coef": balancing})


def _qwen_config(version: str = "2_5", tower: dict[str, Any] | None = None) -> Any:
    import transformers

    config = getattr(transformers, f"Qwen{version}_VLConfig".replace("2_VL", "2VL"))(
        text_config=_QWEN,
        vision_config=_QWEN_TOWER if tower is None else tower,
        image_token_id=IMAGE_TOKEN,
        video_token_id=101,
        vision_start_token_id=102,
        vision_end_token_id=103,
        tie_word_embeddings=False,
        dtype="float32",
    )
    config.architectures = [type(config).__name__.replace("Config", "ForConditionalGeneration")]
    return config


def _pictures(count: int, draw: Generator) -> tuple[dict[str, Tensor], list[int]]:
    """All of one size."""
    size = _CLIP["image_size"]
    return {"pixel_values": torch.randn(count, 3, size, size, generator=draw)}, [16] * count


def _grids(count: int, draw: Generator) -> tuple[dict[str, Tensor], list[int]]:
    """Of several sizes, as rows of patches."""
    sizes = [(1, 4, 4), (1, 4, 6), (1, 8, 4)]
    grids = torch.tensor([sizes[int(each)] for each in torch.randint(0, 3, (count,), generator=draw)]).view(-1, 3)
    patches = grids.prod(1)
    pixels = torch.randn(int(patches.sum()), 3 * 2 * 4 * 4, generator=draw)
    return {"pixel_values": pixels, "image_grid_thw": grids}, [int(each) // 4 for each in patches]


SUBJECTS = {
    "plain": Subject(llava_config, _pictures),
    "tied": Subject(lambda: llava_config(tied=True), _pictures),
    "bf16": Subject(lambda: llava_config(dtype="bfloat16"), _pictures),
    "experts": Subject(mixtral_config, _pictures),
    "SigLIP": Subject(_siglip_config, _pictures),
    "Qwen2-VL": Subject(lambda: _qwen_config("2", _OLDER_TOWER), _grids),
    "Qwen2.5-VL": Subject(_qwen_config, _grids),
}
