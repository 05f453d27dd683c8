"""From flags and a YAML file of Primus to arguments, and which field of a configuration each is. Torch-free."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron.bridge.errors import BridgeError, did_you_mean
from primus.cli.flags import check_framework

# What the guidelines of Primus recommend: (all weights, LoRA).
GUIDELINES: Mapping[str, tuple[Any, Any]] = {
    "lr": (5e-6, 2e-4),
    "min_lr": (5e-7, 2e-5),
    "global_batch_size": (64, 32),
    "micro_batch_size": (1, 1),
    "train_iters": (3000, 3000),
    "lr_warmup_iters": (100, 100),
    "lora_rank": (None, 16),
    "lora_alpha": (None, 32),
    "lora_dropout": (None, 0.05),
    "dataset_format": ("alpaca", "alpaca"),
    "prompt_template": ("alpaca", "alpaca"),
    "split": ("95,5,0", "95,5,0"),
}

# section -> key -> field of the configuration; None: used by the trainer itself.
SECTIONS: Mapping[str, Mapping[str, str | None]] = {
    "": dict.fromkeys(("convert_from_hf", "hf_model_name_or_path", "convert_to_hf", "hf_save_path", "patches")),
    "model": {"load": None, "hf_model_name_or_path": None, "seq_length": None},
    "training": {
        "micro_batch_size": "train.micro_batch_size",
        "global_batch_size": "train.global_batch_size",
        "train_iters": "train.train_iters",
        "eval_interval": "train.eval_interval",
        "eval_iters": "train.eval_iters",
        "lr": "optimizer.lr",
        "min_lr": "optimizer.min_lr",
        "weight_decay": "optimizer.weight_decay",
        "clip_grad": "optimizer.clip_grad",
        "lr_warmup_iters": "scheduler.lr_warmup_iters",
        "lr_decay_style": "scheduler.lr_decay_style",
        "seed": "rng.seed",
    },
    "lora": {
        "use_lora": None,
        "lora_rank": "peft.dim",
        "lora_alpha": "peft.alpha",
        "lora_dropout": "peft.dropout",
        "lora_target_modules": "peft.target_modules",
        "save_lora_only": None,
    },
    "precision": {"precision": "mixed_precision.precision"},
    "parallelism": {
        name: f"model.{name}"
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "sequence_parallel",
        )
    },
    "data": {
        "data_path": None,
        "dataset_format": "dataset.dataset_format",
        "prompt_template": "dataset.prompt_template",
        "custom_template": "dataset.custom_template",
        "split": "dataset.split",
        "truncation": "dataset.truncation",
        "skip_bad_rows": "dataset.skip_bad_rows",
        "num_workers": "dataset.num_workers",
    },
    "checkpointing": {
        "load": None,
        "save": "checkpoint.save",
        "save_interval": "checkpoint.save_interval",
        "most_recent_k": "checkpoint.most_recent_k",
        "convert_to_hf": None,
        "hf_save_path": None,
        "save_lora_only": None,
    },
    "logging": {
        "log_interval": "logger.log_interval",
        "tensorboard_dir": "logger.tensorboard_dir",
        "wandb_project": "logger.wandb_project",
        "progress": "logger.progress",
    },
}


class MegatronBridgeArgBuilder:
    """Arguments by their names in Primus, whichever section they stood in.

    Args:
        file: YAML of sections; None for none.
    """

    def __init__(self, file: str | Path | None = None) -> None:
        self._given = {} if file is None else _read(Path(file))

    def build(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        """Flags over the file over the guidelines.

        Raises:
            BridgeError: values of LoRA that would change nothing.
        """
        given = {**self._given, **flags}
        lora = bool(given.get("use_lora"))
        _refuse_idle(given, flags)
        advised = {name: values[lora] for name, values in GUIDELINES.items() if values[lora] is not None}
        if "lr_warmup_iters" not in given:
            iters = int(given.get("train_iters", advised["train_iters"]))
            advised["lr_warmup_iters"] = min(int(advised["lr_warmup_iters"]), iters // 10)
        return {**advised, **given}


def _refuse_idle(given: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    idle = [name for name in SECTIONS["lora"] if name in flags]
    if idle and not given.get("use_lora"):
        raise BridgeError(f"--{idle[0]} means nothing without LoRA; add --use_lora")
    if given.get("use_lora") and given.get("save_lora_only") is False:
        raise BridgeError(
            "save_lora_only=false is not possible: checkpoints of a run with LoRA hold the adapters alone; leave it "
            "out, and set convert_to_hf for the whole model with the adapters merged"
        )


def overrides(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are fields of a configuration: `section.field` -> value, in their order.

    Those of LoRA are left aside in a run without it.
    """
    if not arguments.get("use_lora"):
        arguments = {name: value for name, value in arguments.items() if name not in SECTIONS["lora"]}
    fields = {key: field for keys in SECTIONS.values() for key, field in keys.items() if field is not None}
    return {fields[name]: value for name, value in arguments.items() if name in fields}


def _read(file: Path) -> dict[str, Any]:
    """The file's values by key.

    Raises:
        BridgeError: no such file, no YAML of sections, keys that mean nothing (all of them), one key with two values.
    """
    try:
        document = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BridgeError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(document, dict):
        raise BridgeError(f"{file} holds no sections; they are framework, {', '.join(filter(None, SECTIONS))}")
    check_framework(document.pop("framework", "megatron_bridge"))
    found: dict[str, Any] = {}
    problems = []
    for section, key, value in _entries(document):
        if section not in SECTIONS:
            problems.append(f"unknown section {section!r}{did_you_mean(section, filter(None, SECTIONS))}")
        elif key not in SECTIONS[section]:
            known = SECTIONS[section] or SECTIONS
            problems.append(f"unknown key {'.'.join(filter(None, (section, key)))!r}{did_you_mean(key, known)}")
        elif key in found and found[key] != value:
            problems.append(f"{key!r} is given twice, as {found[key]!r} and {value!r}")
        else:
            found[key] = _number(value)
    if problems:
        raise BridgeError(f"{file}: " + "; ".join(problems))
    return found


def _entries(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for name, value in document.items():
        if isinstance(value, dict):
            yield from ((name, key, each) for key, each in value.items())
        else:
            yield "", name, value


def _number(value: Any) -> Any:
    """PyYAML reads `5e-6` as text."""
    try:
        return float(value) if isinstance(value, str) and "e" in value else value
    except ValueError:
        return value
