"""From a description to a `ConfigContainer`. Here torch and Megatron-Core are loaded."""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.recipes.base.description import Description

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def build(description: Description) -> "ConfigContainer":
    """The configuration that a description describes; downloads nothing and has no weights.

    Raises:
        BridgeError: a section or field that there is not, or a model that cannot be expressed.
    """
    from megatron.bridge.training.config import ConfigContainer

    sections: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, stated in description.settings.items():
        section, _, field = key.partition(".")
        sections[section][field] = stated.value
    model = provider_of(description, sections.pop("model", {}))
    sections["tokenizer"].setdefault("vocab_size", model.vocab_size)
    sections["dataset"]["sequence_length"] = model.seq_length
    made = {name: _section(name, values) for name, values in sections.items()}
    return ConfigContainer(model=model, **made)


def hf_config(description: Description) -> Any:
    """The model's configuration as transformers has it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = dict(description.hf_config)
    return CONFIG_MAPPING[values.pop("model_type")](**values)


def provider_of(description: Description, fields: dict[str, Any]) -> Any:
    """A provider of the model that `config.json` describes, with further fields set."""
    import torch

    from megatron.bridge import AutoBridge

    dtype = getattr(torch, fields.pop("params_dtype"))
    provider = AutoBridge.from_hf_config(hf_config(description)).to_megatron_provider(load_weights=False, dtype=dtype)
    for name, value in fields.items():
        if not hasattr(provider, name):
            near = did_you_mean(name, vars(provider))
            raise BridgeError(f"model.{name}: {type(provider).__name__} has no such field{near}")
        setattr(provider, name, value)
    return provider


def _section(name: str, values: dict[str, Any]) -> Any:
    """A section of the configuration from its fields."""
    from megatron.bridge.peft import PEFT_METHODS
    from megatron.bridge.training import config

    classes = {
        "train": "TrainingConfig",
        "dataset": "SFTDatasetConfig" if "dataset_format" in values else "GPTDatasetConfig",
        "optimizer": "OptimizerConfig",
        "scheduler": "SchedulerConfig",
        "tokenizer": "TokenizerConfig",
        "checkpoint": "CheckpointConfig",
        "logger": "LoggerConfig",
        "ddp": "DistributedDataParallelConfig",
        "mixed_precision": "MixedPrecisionConfig",
        "comm_overlap": "CommOverlapConfig",
    }
    if name == "peft":
        method = values.pop("")
        return PEFT_METHODS[method](**values) if isinstance(method, str) else method
    if name not in classes:
        raise BridgeError(f"no section of a recipe is called {name!r}{did_you_mean(name, classes)}")
    mock = {"mock": None} if classes[name] == "GPTDatasetConfig" else {}
    try:
        return getattr(config, classes[name])(**{**mock, **values})
    except TypeError as error:
        raise BridgeError(f"section {name!r} of the recipe: {error}") from error
