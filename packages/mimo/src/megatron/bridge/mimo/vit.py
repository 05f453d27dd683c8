"""CLIP's and SigLIP's towers as Megatron-Core's ViT, which tensor-parallel ranks divide among them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron.bridge.conversion.live import TensorsInMemory, load_weights
from megatron.bridge.conversion.table import TREE, WeightTable
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.projectors import tell_group
from megatron.bridge.mimo.vit_settings import KINDS, layers_before, vit_config
from megatron.bridge.mimo.vit_weights import vit_rules
from megatron.bridge.models.layer_specs.vit_spec import vit_layer


class ParallelViT(CLIPViTModel):
    """A tower up to the layer that its features come from; called as transformers' own.

    Heads and channels of the MLPs are divided over the tensor-parallel group. What the features do not depend on,
    later layers, the last norm and a pooling head, is kept in `unused`: as transformers wrote it, whole on every rank
    and never trained, so that an export has all weights.

    Args:
        hf_config: transformers' configuration of the tower.
        layers: how many there are before the features.
        config: see `vit_config`.
        groups: of the module.
    """

    def __init__(self, hf_config: Any, layers: int, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        kind = KINDS[hf_config.model_type]
        super().__init__(
            config,
            vit_layer(config),
            ln_pre_impl=WrappedTorchNorm,
            ln_post_impl=WrappedTorchNorm,
            add_class_token=kind.class_tokens > 0,
            class_token_len=kind.class_tokens,
            patch_dim=hf_config.patch_size,
            img_h=hf_config.image_size,
            img_w=hf_config.image_size,
            model_subtype=kind.subtype,
            pg_collection=groups,
        )
        self.ln_post = None  # transformers takes hidden states before the last norm
        if kind.class_tokens:
            # On one axis, as transformers has it: optimizers do not let such weights decay.
            del self.class_token
            self.class_embedding = nn.Parameter(torch.empty(hf_config.hidden_size))
        self.unused = _unused(hf_config, layers)
        self.hf_config, self.feature_layers = hf_config, layers
        self.to(config.params_dtype)
        tell_group(self, groups)

    @property
    def class_token(self) -> Tensor:
        """As Megatron-Core asks for it, [1, 1, width]."""
        return self.class_embedding[None, None]

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        """As transformers' tower.

        Args:
            pixel_values: [images, channels, height, width].
            options: of transformers' towers; those that ask for outputs change nothing here.

        Returns:
            transformers' output, of whose `hidden_states` only those of the features' layer are there,
            [images, tokens, width].

        Raises:
            BridgeError: the images are not of the size that the tower was made for, or an option would change what is
                computed.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        for name in _meant(options) - {"output_hidden_states", "return_dict"}:
            raise BridgeError(
                f"Megatron-Core's ViT has no option {name!r} ({options[name]!r}); use implementation='transformers'"
            )
        size = (self.img_h, self.img_w)
        if tuple(pixel_values.shape[-2:]) != size:
            raise BridgeError(
                f"images of {tuple(pixel_values.shape[-2:])} pixels in a tower for {size}; resize them, or correct "
                "image_size of its configuration"
            )
        states: list[Tensor | None] = [None] * (self.hf_config.num_hidden_layers + 1)
        states[self.feature_layers] = super().forward(pixel_values)
        return BaseModelOutputWithPooling(hidden_states=tuple(states))


def _meant(options: Mapping[str, Any]) -> set[str]:
    return {name for name, value in options.items() if value is not None and value is not False}


def build_vit(
    hf_config: Any,
    feature_layer: int,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    *,
    initialized: bool,
) -> ParallelViT:
    """A tower of transformers as Megatron-Core's ViT. With `initialized`, collective over its tensor-parallel group.

    Args:
        hf_config: transformers' configuration of the tower, of which `vit_problems` finds none.
        feature_layer: whose hidden states are the features, as transformers counts.
        config: the encoder module's.
        groups: of the module.
        initialized: give it the weights that transformers draws; otherwise they hold anything until they are loaded.
    """
    layers = layers_before(hf_config, feature_layer)
    # Before anything else draws random numbers, so that both implementations begin alike.
    drawn = _model_class(hf_config)._from_config(hf_config, dtype=config.params_dtype) if initialized else None
    vit = ParallelViT(hf_config, layers, vit_config(hf_config, layers, config), groups)
    if drawn is not None:
        source, rules = TensorsInMemory(drawn.state_dict()), WeightTable.of(vit_rules(hf_config, layers))
        load_weights(vit, rules, source, "a random tower", groups=groups)
    return vit


def with_vit_rules(table: WeightTable, model: nn.Module) -> WeightTable:
    """The table for a model whose towers are Megatron-Core's, in which they are sub-trees as transformers wrote them.

    Args:
        table: of a Hugging Face model.
        model: with the names of the table.
    """
    rules = list(table.rules)
    for name, tower in model.named_modules():
        if isinstance(tower, ParallelViT):
            (tree,) = (rule for rule in rules if rule.megatron == f"{name}{TREE}")
            own = WeightTable.of(vit_rules(tower.hf_config, tower.feature_layers))
            rules.remove(tree)
            rules += own.under(f"{name}.", {"": f"{tree.hf_names[0].removesuffix(TREE)}."}).rules
    return replace(table, rules=tuple(rules))


def _model_class(hf_config: Any) -> Any:
    import transformers

    return getattr(transformers, KINDS[hf_config.model_type].model)


def _unused(hf_config: Any, layers: int) -> nn.Module:
    """What follows the features, with transformers' names, without values."""
    with torch.device("meta"):
        model = _model_class(hf_config)(hf_config)
    kept = nn.Module()
    kept.encoder = nn.Module()
    later = {str(number): layer for number, layer in enumerate(model.encoder.layers) if number >= layers}
    kept.encoder.layers = nn.ModuleDict(later)
    kept.post_layernorm = model.post_layernorm
    if hasattr(model, "head"):
        kept.head = model.head
    return kept.to_empty(device="cpu").requires_grad_(False)
