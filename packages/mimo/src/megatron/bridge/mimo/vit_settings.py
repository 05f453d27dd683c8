"""Which towers Megatron-Core's ViT can be, and its configuration. Nothing is built for it.

The tower's configuration is transformers' own.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import did_you_mean
from megatron.bridge.models.families.activations import ACTIVATIONS, activation

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

TRANSFORMERS, MEGATRON = "transformers", "megatron"
IMPLEMENTATIONS = (TRANSFORMERS, MEGATRON)
_OTHERWISE = f"set implementation={TRANSFORMERS!r}"


@dataclass(frozen=True)
class ViTKind:
    """How one kind of tower is built.

    Args:
        subtype: what Megatron-Core calls it.
        model: transformers' class.
        class_tokens: before those of the patches.
    """

    subtype: str
    model: str
    class_tokens: int


# By transformers' name of the configuration.
KINDS = {
    "clip_vision_model": ViTKind("clip", "CLIPVisionModel", 1),
    "siglip_vision_model": ViTKind("siglip", "SiglipVisionModel", 0),
}
# Values of transformers' configuration that Megatron-Core's ViT takes for granted.
_FIXED = {"num_channels": 3, "attention_dropout": 0.0}
# What tensor parallelism divides.
_DIVIDED = ("num_attention_heads", "intermediate_size")


def implementation_problems(implementation: str) -> Iterator[str]:
    """An implementation that is not known."""
    if implementation not in IMPLEMENTATIONS:
        near = did_you_mean(implementation, IMPLEMENTATIONS)
        yield f"implementation={implementation!r} is unknown{near}; set one of {', '.join(map(repr, IMPLEMENTATIONS))}"


def vit_problems(hf_config: Any, feature_layer: Any, tensor_parallel: int) -> Iterator[str]:
    """Why a tower cannot be Megatron-Core's ViT at a layout, each with its remedy.

    Args:
        hf_config: transformers' configuration of the tower.
        feature_layer: whose hidden states are the features, as transformers counts.
        tensor_parallel: ranks that divide it.
    """
    if hf_config.model_type not in KINDS:
        yield _told(f"it is for {' and '.join(KINDS)}, and the tower is {hf_config.model_type!r}")
        return
    for name, value in _FIXED.items():
        if (given := getattr(hf_config, name)) != value:
            yield _told(f"{name}={given} of the tower's configuration must be {value}")
    image, patch = hf_config.image_size, hf_config.patch_size
    if not (isinstance(image, int) and isinstance(patch, int)) or image % patch:
        yield _told(f"image_size={image} must be one number that patch_size={patch} divides")
    if hf_config.hidden_act not in ACTIVATIONS:
        yield _told(f"hidden_act={hf_config.hidden_act!r} is not among {', '.join(ACTIVATIONS)}")
    for name in _DIVIDED:
        if (size := getattr(hf_config, name)) % tensor_parallel:
            yield (
                f"tensor_parallel={tensor_parallel} does not divide {name}={size} of its tower; choose a divisor, or "
                f"{_OTHERWISE}"
            )
    depth = hf_config.num_hidden_layers
    if not isinstance(feature_layer, int) or not 1 <= layers_before(hf_config, feature_layer) <= depth:
        yield _told(f"its features must be those of one of the {depth} layers, not of {feature_layer}")


def _told(problem: str) -> str:
    return f"implementation={MEGATRON!r}: {problem}; {_OTHERWISE}"


def layers_before(hf_config: Any, feature_layer: int) -> int:
    """How many layers make the features; transformers counts the embeddings as hidden states 0."""
    return feature_layer if feature_layer >= 0 else int(hf_config.num_hidden_layers) + 1 + feature_layer


def vit_config(hf_config: Any, layers: int, module: "TransformerConfig") -> "TransformerConfig":
    """Megatron-Core's configuration of the tower's first layers.

    Args:
        hf_config: transformers' configuration of the tower.
        layers: how many.
        module: the configuration of the encoder module, for precision and parallel sizes.
    """
    heads = hf_config.num_attention_heads
    sizes = {
        "num_layers": layers,
        "hidden_size": hf_config.hidden_size,
        "ffn_hidden_size": hf_config.intermediate_size,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": hf_config.hidden_size // heads,
    }
    norm = {"normalization": "LayerNorm", "layernorm_epsilon": hf_config.layer_norm_eps}
    plain = {"add_bias_linear": True, "gated_linear_unit": False, "activation_func": activation(hf_config.hidden_act)}
    fusions = {"bias_activation_fusion": False, "gradient_accumulation_fusion": False}
    # Weights are always given: those of a folder, or those that transformers draws.
    weights = {"perform_initialization": False, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return dataclasses.replace(module, **sizes, **norm, **plain, **fusions, **weights)
