"""Whether what a run starts from is of the run's model, by the configuration that lies beside the weights.

Tensors of another model may have the very shapes of this one's (4 heads of 8 channels with 2 key heads, and 2 heads of
16 with 1), so that shapes alone do not tell. No tensor is read.
"""

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.hf.names import CONFIG
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

# Fields of a provider that say how many weights there are and what they mean.
_DECISIVE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "share_embeddings_and_output_weights",
    "gated_linear_unit",
    "add_bias_linear",
    "add_qkv_bias",
    "normalization",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "hybrid_layer_pattern",
)
_MISSING = object()


def other_model_problems(setting: str, start: Path, cfg: "ConfigContainer") -> Iterator[str]:
    """In which fields the model that `start` holds differs from `cfg.model`.

    Args:
        setting: which names `start`, for the message.
        start: a Hugging Face folder, or a checkpoint folder. One that does not say of which model it is gives nothing.
        cfg: of the run.
    """
    held = _described(start)
    here = _decisive({name: getattr(cfg.model, name, _MISSING) for name in _DECISIVE})
    there = {} if held is None else _decisive(held)
    differing = [
        f"{name} is {here[name]!r} in cfg.model and {there[name]!r} there"
        for name in here.keys() & there.keys()
        if here[name] != there[name]
    ]
    if differing:
        yield (
            f"{setting}: {start} is of another model: {', '.join(sorted(differing))}; make the model like it, or "
            "start from another"
        )


def _decisive(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the decisive fields, with what Megatron-Core takes for those that are not set."""
    found = {name: value for name, value in values.items() if value is not _MISSING}
    hidden, heads = found.get("hidden_size"), found.get("num_attention_heads")
    if hidden and heads:
        usual = {"ffn_hidden_size": 4 * hidden, "num_query_groups": heads, "kv_channels": hidden // heads}
        found |= {name: value for name, value in usual.items() if found.get(name) is None}
    if found.get("num_moe_experts") and found.get("moe_ffn_hidden_size") is None:
        found["moe_ffn_hidden_size"] = found.get("ffn_hidden_size")
    if found.get("vocab_size") is None:  # that of a tokenizer that is not read yet
        found.pop("vocab_size", None)
    return found


def _described(start: Path) -> dict[str, Any] | None:
    """The decisive fields by what lies beside the weights: the run's own configuration, else Hugging Face's."""
    from megatron.bridge.conversion.megatron_checkpoint import HF_FILES
    from megatron.bridge.training.side_files import RUN_CONFIG

    if (start / RUN_CONFIG).is_file():
        return _of_run(start / RUN_CONFIG)
    folder = start if (start / CONFIG).is_file() else start / HF_FILES
    return _of_hugging_face(folder) if (folder / CONFIG).is_file() else None


def _of_run(file: Path) -> dict[str, Any] | None:
    from megatron.bridge.training.overrides import CLASS_KEY, read_sections

    try:
        model = read_sections(file).get("model")
        module, _, name = str(model[CLASS_KEY]).partition(":")  # type: ignore[index]
        fields = dataclasses.fields(getattr(importlib.import_module(module), name))
    except (BridgeError, ImportError, AttributeError, LookupError, TypeError):
        return None  # written by other code than this: the weights themselves are compared when they are loaded
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    values = defaults | dict(model)  # type: ignore[arg-type]
    return {name: values.get(name, _MISSING) for name in _DECISIVE}


def _of_hugging_face(folder: Path) -> dict[str, Any] | None:
    from megatron.bridge.conversion.auto_bridge import AutoBridge

    try:
        provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider(load_weights=False)
    except BridgeError:
        return None  # told with the weights, when they are loaded
    return {name: getattr(provider, name, _MISSING) for name in _DECISIVE}
