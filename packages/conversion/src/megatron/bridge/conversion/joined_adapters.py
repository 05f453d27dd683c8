"""Adapters of several modules of one model, in one folder of Hugging Face peft.

peft has one configuration for the whole model. Ranks and alphas may differ by its patterns; all else must be the same.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron.bridge.conversion.hf_adapter import AdapterFiles
from megatron.bridge.conversion.peft_names import PeftNames
from megatron.bridge.errors import BridgeError

# What is worked out for all targets together.
_BY_TARGET = ("target_modules", "target_parameters", "r", "lora_alpha", "rank_pattern", "alpha_pattern")
# Plays no part but in training, where each module has its own.
_DROPOUT = "lora_dropout"


def joined(parts: "Sequence[tuple[str, AdapterFiles]]", names: PeftNames) -> AdapterFiles:
    """One adapter of all modules.

    Args:
        parts: name of each module, and its adapter with the targets that it is on; no two are on the same.
        names: how peft names the modules of the whole model.

    Raises:
        BridgeError: peft cannot hold them together; names what differs, and where.
    """
    first = parts[0][1]
    if len(parts) == 1:
        return first
    _refuse_unlike(parts)
    config = dict(first.config)
    targets = [target for _, part in parts for target in part.targets]
    modules, parameters = names.shortened(targets)
    config |= {"target_modules": modules} | ({"target_parameters": parameters} if parameters else {})
    if len({part.config[_DROPOUT] for _, part in parts}) > 1:
        config[_DROPOUT] = 0.0
    weights = {name: each for _, part in parts for name, each in part.weights.items()}
    return replace(first, weights=weights, config=config | _patterns(parts), targets=tuple(targets))


def _refuse_unlike(parts: "Sequence[tuple[str, AdapterFiles]]") -> None:
    (one, first), *others = parts
    for name, part in others:
        for key in sorted({*first.config, *part.config} - {*_BY_TARGET, _DROPOUT}):
            ours, theirs = first.config.get(key), part.config.get(key)
            if ours != theirs:
                raise BridgeError(
                    f"peft's folder has one {key} for all modules, and here {one!r} has {ours!r} and {name!r} has "
                    f"{theirs!r}; let both have the same, or export the merged model (save_hf_pretrained)"
                )


def _patterns(parts: "Sequence[tuple[str, AdapterFiles]]") -> dict[str, Any]:
    """The commonest rank and alpha, and the targets that have others."""
    held = {
        target: (
            part.config["rank_pattern"].get(target, part.config["r"]),
            part.config["alpha_pattern"].get(target, part.config["lora_alpha"]),
        )
        for _, part in parts
        for target in part.targets
    }
    rank, alpha = Counter(held.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {target: own for target, (own, _) in held.items() if own != rank},
        "alpha_pattern": {target: own for target, (_, own) in held.items() if own != alpha},
    }
