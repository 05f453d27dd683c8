"""The weights of Megatron-Core's ViT by the names of transformers' towers."""

from typing import Any

from megatron.bridge.conversion.table import TREE, WeightRule
from megatron.bridge.mimo.vit_settings import KINDS
from megatron.bridge.models.fragments import WEIGHT_AND_BIAS, HFNames, at_layers, attention, plain_mlp, pre_norms

_NAMES = HFNames(
    layer="encoder.layers.{l}",
    input_norm="layer_norm1",
    mlp_norm="layer_norm2",
    attention_output="self_attn.out_proj",
    fc1=("mlp.fc1",),
    fc2="mlp.fc2",
)


def vit_rules(hf_config: Any, layers: int) -> list[WeightRule]:
    """One rule per kind of weight of a tower.

    Args:
        hf_config: transformers' configuration of it.
        layers: how many are Megatron-Core's; those behind them are `unused`.
    """
    heads = hf_config.num_attention_heads
    projections = attention(
        heads=heads,
        groups=heads,
        head_dim=hf_config.hidden_size // heads,
        qkv_bias=True,
        output_bias=True,
        names=_NAMES,
    )
    layer = [*pre_norms(WEIGHT_AND_BIAS, names=_NAMES), *projections, *plain_mlp(bias=True, names=_NAMES)]
    return [*_embeddings(hf_config), *at_layers(layer, range(layers)), *_unused(hf_config, layers)]


def _embeddings(hf_config: Any) -> list[WeightRule]:
    """Patches, positions and, of CLIP's tower, the class token and the norm before the first layer."""
    patches = "embeddings.patch_embedding"
    rules = [
        WeightRule("conv1.weight", f"{patches}.weight"),
        WeightRule("position_embeddings.weight", "embeddings.position_embedding.weight"),
    ]
    if not KINDS[hf_config.model_type].class_tokens:
        return [*rules, WeightRule("conv1.bias", f"{patches}.bias")]
    norm = [WeightRule(f"ln_pre.{kind}", f"pre_layrnorm.{kind}") for kind in WEIGHT_AND_BIAS]
    return [*rules, WeightRule("class_embedding", "embeddings.class_embedding"), *norm]


def _unused(hf_config: Any, layers: int) -> list[WeightRule]:
    pools = not KINDS[hf_config.model_type].class_tokens and getattr(hf_config, "vision_use_head", True)
    names = [f"encoder.layers.{number}" for number in range(layers, hf_config.num_hidden_layers)]
    names += ["post_layernorm", *(["head"] if pools else [])]
    return [WeightRule(f"unused.{name}{TREE}", f"{name}{TREE}") for name in names]
