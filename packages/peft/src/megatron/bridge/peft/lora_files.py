"""A LoRA method of what peft says in `adapter_config.json`; what Megatron models cannot have is refused by name."""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.peft.dora import DoRA
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.targets import REGEX

if TYPE_CHECKING:
    import torch

# Settings of training that leave no trace in the weights, and those that are read here.
OF_TRAINING = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "corda_config",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
_READ = {
    "alpha_pattern",
    "exclude_modules",
    "fan_in_fan_out",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "use_dora",
    "use_rslora",
}
# What everything else must be: peft's own words for "not used".
_UNUSED: tuple[Any, ...] = (None, False, [], {}, "none")

# What peft puts between the wrappers of two parameters of one module.
_INNER = ".base_layer"
_A = re.compile(r"(.+)\.(?:lora_A\.weight|lora_embedding_A)")


def refuse_unknown_features(config: Mapping[str, Any], known: set[str]) -> None:
    """Refuse features of peft's configuration that are in use and not among `known`.

    Raises:
        BridgeError: names every one.
    """
    used = [f"{key}={value!r}" for key, value in sorted(config.items()) if key not in known and value not in _UNUSED]
    if used:
        raise BridgeError(
            f"the adapter uses what Megatron models cannot have: {', '.join(used)}; merge it in peft "
            "(merge_and_unload) and convert the merged model"
        )


def lora_from_hf(config: Mapping[str, Any], tensors: "Mapping[str, torch.Tensor]", adapter_name: str) -> LoRA:
    """The method that gives adapters such as peft's file holds.

    Args:
        config: `adapter_config.json`.
        tensors: of the file.
        adapter_name: of the adapters.

    Raises:
        BridgeError: names each feature that cannot be represented.
    """
    refuse_unknown_features(config, OF_TRAINING | _READ)
    modules = hf_targets(tensors, config.get("target_parameters") or ())
    if not modules:
        raise BridgeError("the adapter's file holds no LoRA weights (NAME.lora_A.weight)")
    return (DoRA if config.get("use_dora") else LoRA)(
        target_modules=modules,
        adapter_name=adapter_name,
        dim=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        use_rslora=bool(config.get("use_rslora")),
        # peft has a pair of matrices for each module; some share an A all the same, as those that were trained here.
        separate_parts=True,
        shared_parts=[*_sharing(tensors), *(each for each in modules if each.startswith(REGEX))],
        share_experts=_experts_alike(tensors, config),
        rank_pattern=_patterns(config.get("rank_pattern")),
        alpha_pattern=_patterns(config.get("alpha_pattern")),
    )


def _sharing(tensors: "Mapping[str, torch.Tensor]") -> list[str]:
    """Modules that have the same A, bit for bit, as another one beside them."""
    held = {match[1]: tensor for name, tensor in tensors.items() if (match := _A.fullmatch(name))}
    beside: dict[str, list[str]] = {}
    for module in held:
        beside.setdefault(module.rpartition(".")[0], []).append(module)
    return [
        module
        for module in held
        if any(other != module and held[other].equal(held[module]) for other in beside[module.rpartition(".")[0]])
    ]


def _experts_alike(tensors: "Mapping[str, torch.Tensor]", config: Mapping[str, Any]) -> bool:
    """Whether all experts of every layer have the same matrices, bit for bit, as those that were trained as one."""
    parameters, rank = config.get("target_parameters"), config["r"]
    if not parameters or config.get("rank_pattern"):
        return False
    stacked = [(name, each) for name, each in tensors.items() if ".experts." in name and ".lora_" in name]
    by_expert = [
        each.unflatten(1, (rank, -1)).permute(2, 0, 1) if ".lora_B" in name else each.unflatten(0, (-1, rank))
        for name, each in stacked
    ]
    return bool(by_expert) and all(len(each) > 1 and each.eq(each[0]).all() for each in by_expert)


def hf_targets(tensors: Iterable[str], parameters: Iterable[str] = ()) -> list[str]:
    """Target patterns for the modules that a file of peft has LoRA weights of.

    Args:
        tensors: names of the file's weights.
        parameters: the configuration's target parameters.
    """
    found = (_A.fullmatch(name) for name in tensors)
    modules = {match[1] for match in found if match}
    return sorted(_of_experts(module, modules, parameters) for module in modules)


def _of_experts(module: str, modules: set[str], parameters: Iterable[str]) -> str:
    """Stacked experts: where both of their layers have adapters, the inner wrapper is the first one's."""
    parent = module.removesuffix(_INNER)
    if not parent.endswith(".experts"):
        return module
    both = f"{parent}{_INNER}" in modules
    first = module != parent or (not both and any(name.endswith("gate_up_proj") for name in parameters))
    leaves = "gate_up_proj|gate_proj|up_proj" if first else "down_proj"
    return rf"re:{re.escape(parent)}\.(\d+\.)?({leaves})"


def _patterns(found: Mapping[str, Any] | None) -> dict[str, Any]:
    """peft's patterns, which are expressions of the end of a name."""
    return {rf"re:(?:.*\.)?(?:{pattern})": value for pattern, value in (found or {}).items()}
