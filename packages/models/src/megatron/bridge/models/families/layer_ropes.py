"""Rotary settings that differ between kinds of layers."""

from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def rope_fields_by_layer_type(config: "PretrainedConfig") -> dict[str, Any]:
    """Provider fields for `rope_parameters` that are one dictionary per name in `layer_types`.

    Raises:
        BridgeError: a kind of layer has no settings.
    """
    kinds = config.rope_parameters
    absent = sorted(kind for kind in set(config.layer_types) if not kinds.get(kind))
    if absent:
        raise BridgeError(f"config.json: rope_parameters lack {', '.join(absent)}, which layer_types names")
    return {"layer_rope_parameters": [dict(kinds[kind]) for kind in config.layer_types]}
