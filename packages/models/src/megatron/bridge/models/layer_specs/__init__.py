"""Layer specs: which modules a GPT decoder is made of, chosen by name.

A spec is offered under the entry-point group `megatron.bridge.layer_specs` as a function
`build(config, *, vp_stage)` that returns the decoder's submodules. This project offers `transformer_engine` (the fast
path on CUDA), `torch` (our own, on any device) and `local` (stock Megatron-Core). All three use one set of checkpoint
keys, so that each loads what another has saved.
"""

import importlib.util
from typing import TYPE_CHECKING, Protocol

from megatron.bridge.registry import Registry

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["LAYER_SPECS", "LayerSpecBuilder", "default_layer_spec"]


class LayerSpecBuilder(Protocol):
    """What an entry point of the group `megatron.bridge.layer_specs` names."""

    def __call__(
        self, config: "TransformerConfig", *, vp_stage: int | None
    ) -> "ModuleSpec | TransformerBlockSubmodules":
        """Build the decoder's spec for this rank.

        Args:
            config: the finished Megatron-Core config of the model.
            vp_stage: which virtual pipeline stage the chunk is, or None without virtual stages.

        Returns:
            The spec of every layer alike, or the specs of this rank's layers and the final norm.

        Raises:
            BridgeError: the config asks for something that the spec's modules cannot do.
        """
        ...


def _is_builder(value: object) -> bool:
    """a function build(config, *, vp_stage) -> ModuleSpec | TransformerBlockSubmodules"""
    return callable(value) and not isinstance(value, type)


LAYER_SPECS: Registry[LayerSpecBuilder] = Registry("megatron.bridge.layer_specs", _is_builder, "layer spec")


def default_layer_spec() -> str:
    """`transformer_engine` where CUDA is there and Transformer Engine is installed, else `torch`."""
    from megatron.bridge.platform import device

    engine = importlib.util.find_spec("transformer_engine") is not None
    return "transformer_engine" if engine and device().type == "cuda" else "torch"
