"""The Hugging Face configuration of a Megatron model: the source's, with everything the Megatron side changed."""

import copy
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.live_weights import as_chunks
from megatron.bridge.conversion.weight_source import QUANTIZATION_KEYS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from megatron.bridge.conversion.live import Model
    from megatron.bridge.conversion.model_bridge import MegatronModelBridge

# Provider fields that a built model keeps under another name than its config's.
_MODEL_ATTRIBUTES = {
    "vocab_size": "unpadded_vocab_size",
    "share_embeddings_and_output_weights": "share_embeddings_and_output_weights",
    "max_position_embeddings": "max_position_embeddings",
    "num_labels": "num_labels",
    "encoder_num_layers": "encoder_num_layers",
}


def changed_values(bridge: "MegatronModelBridge", model: "Model") -> dict[str, Any]:
    """Configuration values in which `model` differs from the bridge's configuration: fewer layers, more tokens, ..."""
    chunk = as_chunks(model)[0]
    held = {name: _value(chunk, field) for field, name in bridge.shared_fields.items()}
    changed = {
        name: value
        for name, value in held.items()
        if value is not None and value != operator.attrgetter(name)(bridge.hf_config)
    }
    return changed | bridge.further_changes(chunk.config)


def with_values(config: "PretrainedConfig", values: Mapping[str, Any]) -> "PretrainedConfig":
    """A copy of a configuration with some values changed."""
    changed = copy.deepcopy(config)
    for name, value in values.items():
        *within, last = name.split(".")
        setattr(operator.attrgetter(".".join(within))(changed) if within else changed, last, value)
    return changed


def config_json(config: "PretrainedConfig", source: Path | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` should say: the source's own file with the changes, or the configuration object's values.

    How the source's weights were quantised is left out: what is written is in full precision.
    """
    changes = dict(changes)
    if "num_labels" in changes:  # files spell it by naming the labels
        changes |= {name: getattr(config, name) for name in ("id2label", "label2id")}
        del changes["num_labels"]
    if source is None:
        values: dict[str, Any] = config.to_dict()
        values.pop("_name_or_path", None)
        return _changed(in_full_precision(values), changes)
    values = in_full_precision(json.loads((source / "config.json").read_text(encoding="utf-8")))
    # Files written before transformers 5 spell it `torch_dtype`.
    spelled = {"dtype": "torch_dtype"} if "torch_dtype" in values else {}
    return _changed(values, {spelled.get(name, name): value for name, value in changes.items()})


def _changed(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with changes, whose dots lead into dictionaries; older files have no such dictionary but its values."""
    changed = copy.deepcopy(values)
    for name, value in changes.items():
        *within, last = name.split(".")
        place = changed
        for part in within:
            place = place.get(part, place)
        place[last] = value
    return changed


def in_full_precision(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's values without what they say about low-bit weights, in parts of it too."""
    kept = {name: value for name, value in values.items() if name not in QUANTIZATION_KEYS}
    return {name: in_full_precision(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _value(chunk: Any, field: str) -> Any:
    if field in _MODEL_ATTRIBUTES:
        return getattr(chunk, _MODEL_ATTRIBUTES[field], None)
    return getattr(chunk.config, field, None)
