"""Biases that Megatron-Core's one switch (`add_bias_linear`) cannot say: attention's output and the MLP apart."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig


def with_biases(spec: Any, config: TransformerConfig, attention_output: bool | None, mlp: bool | None) -> Any:
    """The decoder's spec with these biases, where they differ from `config.add_bias_linear`.

    Args:
        spec: a layer spec or the specs of a block.
        attention_output: bias of attention's output projection, None to follow the config.
        mlp: bias of both of the MLP's projections, None to follow the config.
    """
    attention_output = config.add_bias_linear if attention_output is None else attention_output
    mlp = config.add_bias_linear if mlp is None else mlp
    if attention_output == mlp == config.add_bias_linear:
        return spec
    if isinstance(spec, TransformerBlockSubmodules):
        layers = [with_biases(layer, config, attention_output, mlp) for layer in spec.layer_specs or ()]
        return dataclasses.replace(spec, layer_specs=layers)
    layer = spec.submodules
    # Linear attention has no such projection.
    if attention_output != config.add_bias_linear and hasattr(layer.self_attention.submodules, "linear_proj"):
        attention = _with_bias(layer.self_attention, ("linear_proj",), attention_output)
        layer = dataclasses.replace(layer, self_attention=attention)
    if mlp != config.add_bias_linear:
        layer = dataclasses.replace(layer, mlp=_with_bias(layer.mlp, ("linear_fc1", "linear_fc2"), mlp))
    return dataclasses.replace(spec, submodules=layer)


def _with_bias(part: Any, projections: tuple[str, ...], bias: bool) -> Any:
    """A part's spec (attention's `ModuleSpec`, or the MLP's `partial`) whose projections are built with this bias."""
    submodules = part.submodules if isinstance(part, ModuleSpec) else part.keywords["submodules"]
    builders = {name: _forcing_bias(getattr(submodules, name), bias) for name in projections}
    changed = dataclasses.replace(submodules, **builders)
    if isinstance(part, ModuleSpec):
        return dataclasses.replace(part, submodules=changed)
    return functools.partial(part.func, *part.args, **{**part.keywords, "submodules": changed})


def _forcing_bias(builder: Callable[..., Any], bias: bool) -> Callable[..., Any]:
    def build(*args: Any, **kwargs: Any) -> Any:
        return builder(*args, **{**kwargs, "bias": bias})

    return build
