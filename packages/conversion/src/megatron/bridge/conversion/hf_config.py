"""One reader of Hugging Face configurations, whatever version of transformers wrote them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a configuration: base, share of the head that turns, and the scaling's own dictionary."""

    theta: float
    percent: float
    scaling: Mapping[str, Any] | None


def read_config(folder: str | Path, *, trust_remote_code: bool = False) -> "PretrainedConfig":
    """The configuration of a Hugging Face folder.

    Raises:
        BridgeError: no config.json, invalid JSON, an unknown model type, or remote code that is not trusted.
    """
    from transformers import AutoConfig

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise BridgeError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    _import_family_of_unknown_model(path)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    # Its validators and remote code raise what they like.
    except Exception as error:
        raise BridgeError(f"{path} cannot be read as a model configuration: {error}") from error
    return config


def _import_family_of_unknown_model(path: Path) -> None:
    """Import the family of a model type that transformers does not know: its package may register one."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from megatron.bridge.conversion.model_bridge import MODEL_BRIDGES

    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        unknown = stated["model_type"] not in CONFIG_MAPPING
        names = list(stated["architectures"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # transformers says what is wrong with it
    for name in names:
        if unknown and name in MODEL_BRIDGES:
            MODEL_BRIDGES[name]


def architecture(config: "PretrainedConfig") -> str:
    """The one architecture name that the configuration states.

    Raises:
        BridgeError: it states none, or several.
    """
    names = config.architectures or []
    if not isinstance(names, list | tuple) or len(names) != 1 or not isinstance(names[0], str):
        raise BridgeError(
            f'config.json must name one architecture, e.g. "architectures": ["LlamaForCausalLM"]; it names {names}'
        )
    return names[0]


def head_dim(config: "PretrainedConfig") -> int:
    """Channels per attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope(config: "PretrainedConfig") -> Rope:
    """Rotary settings; transformers before version 5 spread them over `rope_theta` and `rope_scaling`.

    Raises:
        BridgeError: no base frequency is stated, or layers of different kinds have different settings.
    """
    parameters: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    if any(isinstance(value, dict) for value in parameters.values()):
        raise BridgeError(
            f"rope_parameters differ between kinds of layers, which this family cannot express: {parameters}"
        )
    theta = parameters.get("rope_theta", getattr(config, "rope_theta", None))
    if theta is None:
        raise BridgeError("config.json states no rope_theta, so the rotary frequencies are unknown")
    percent = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    scaled = parameters.get("rope_type", "default") != "default"
    return Rope(float(theta), float(percent), {**parameters, "rope_theta": float(theta)} if scaled else None)


def dtype(config: "PretrainedConfig") -> "torch.dtype":
    """dtype the weights were saved in; float32 when the configuration does not say."""
    import torch

    stated = getattr(config, "dtype", None)
    if stated is None or isinstance(stated, torch.dtype):
        return stated or torch.float32
    found = getattr(torch, str(stated).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise BridgeError(f"config.json: dtype {stated!r} is not a torch dtype")
    return found
